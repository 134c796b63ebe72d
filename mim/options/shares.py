"""Lists of shares on the command line, as ``--shares 0.75,0.5``."""

from mim.errors import UserError


def parse_shares(text: str) -> list[float]:
    """Numbers above 0, up to 1; raises ``UserError`` for any other."""
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        raise UserError(f"--shares {text}: these are not numbers", hint="--shares 0.75,0.5") from None
    if not all(0 < share <= 1 for share in shares):
        raise UserError(f"--shares {text}: each is above 0, up to 1", hint="--shares 0.75,0.5")
    return shares

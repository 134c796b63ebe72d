"""What every masking policy is."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mim.randomness import RowGenerator


class Masking(nn.Module):
    """Decides which patches of an image are hidden.

    Attributes:
        guided: needs scores to choose by.
        ratio_settings: the arguments that say how much is hidden; ``--mask_ratio`` sets them all.
    """

    guided: ClassVar[bool] = False
    ratio_settings: ClassVar[tuple[str, ...]] = ()

    def extra_repr(self) -> str:
        """The policy's settings, as a run prints them before it starts."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "training"}
        return ", ".join(f"{name}={value}" for name, value in own.items())

    def visible_count(self, patches: int) -> int | None:
        """How many of ``patches`` stay visible in every image; None if that differs between images."""
        return None

    def most_hidden(self, patches: int) -> int:
        """The most of ``patches`` that are ever hidden in an image."""
        return patches - (self.visible_count(patches) or 0)

    def forward(
        self,
        batch_size: int,
        grid: tuple[int, int],
        *,
        scores: Tensor | None = None,
        progress: float = 0.0,
        generator: RowGenerator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw one mask per image.

        Args:
            batch_size: number of images ``B``.
            grid: ``(h, w)`` patches per side, ``N = h*w``.
            scores: ``(B, N)``, higher is hidden first; only guided policies look at them.
            progress: share of training done, 0 to 1.
            generator: random numbers of each row; fresh ones, seeded by torch's global generator, if not given.
            device: where the masks are wanted; the generator's device if not given.

        Returns:
            ``(B, N)`` bool, True = hidden.
        """
        raise NotImplementedError


def fresh_rows(batch_size: int, device: torch.device | str | None) -> RowGenerator:
    """Row keys drawn from torch's global generator."""
    return RowGenerator(torch.randint(2**62, (batch_size,), device=device), int(torch.randint(2**62, ())))


def check_ratios(low: float, high: float, whole: float) -> None:
    """Refuses a range of ratios, or a share of images left whole, that cannot be.

    Raises:
        ValueError: unless ``0 <= low <= high < 1`` and ``0 <= whole <= 1``.
    """
    if not 0 <= low <= high < 1 or not 0 <= whole <= 1:
        raise ValueError(f"need 0 <= low <= high < 1 and 0 <= whole <= 1, not {low}, {high} and {whole}")

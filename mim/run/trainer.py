"""Lightning's trainer as every training here uses it: its step, strategies and precision; the rest is our own."""

from collections.abc import Mapping
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException

from mim.errors import UserError

_NAMED = ("accelerator", "devices", "num_nodes", "precision", "strategy")


def build_trainer(settings: Mapping[str, Any], option: str = "--{}", **own: Any) -> Trainer:  # noqa: ANN401 - Lightning's
    """A trainer that counts steps alone; progress, logs, checkpoints and the order of images are not its business.

    Args:
        settings: what the user may choose, under Lightning's names.
        option: how a setting is typed, with its name in the braces.
        own: what the program chooses, such as ``max_steps``, ``callbacks`` and ``plugins``.

    Raises:
        UserError: if there is no such machine.
    """
    try:
        return Trainer(
            **settings,
            **own,
            max_epochs=-1,
            logger=False,
            log_every_n_steps=1 << 62,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
        given = [
            f"{option.format(name)} {value}"
            for name, value in settings.items()
            if name in _NAMED and value not in ("auto", None, 1)
        ]
        hint = f"--devices 1   or   {option.format('accelerator')} cpu"
        raise UserError(f"{' '.join(given)} cannot be used here", why=str(error), hint=hint) from error

"""Lightning's trainer as every training here uses it: its step, strategies and precision; the rest is our own."""

from collections.abc import Mapping
from contextlib import suppress
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
        why = str(error)
        raise UserError(
            f"{' '.join(given)} cannot be used here", why=why, hint=_what_works(settings, option)
        ) from error


def _what_works(settings: Mapping[str, Any], option: str) -> str:
    """The one option that has to be another for there to be such a machine, or all that may."""
    options = {
        "devices": "--devices 1",
        "strategy": "--strategy ddp",
        "accelerator": f"{option.format('accelerator')} auto",
    }
    for name, typed in options.items():
        with suppress(ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException):
            Trainer(**{**settings, name: typed.split()[1]}, logger=False, enable_checkpointing=False)
            return typed
    return " ".join(options.values())

"""Checkpoints at fixed steps and at signals, always between two optimizer steps."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer

from mim.checkpoint_io import checkpoint_name, sweep
from mim.methods import Method

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Checkpoints(Callback):
    """Saves every ``every`` steps, after the last step, and after the step in which a signal came; that ends the run.

    Comes last among the callbacks: what the others wrote about a step is then on disk before the step's checkpoint.

    Args:
        folder: where checkpoints go.
        every: optimizer steps between two of them.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._seen = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals over from Lightning, whose handlers act in the middle of a step."""
        if trainer.is_global_zero and self.folder.exists():
            sweep(self.folder)
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._note)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the step that a resumed run starts from."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Saves if it is time; stops if a signal came to any process."""
        step = trainer.global_step
        if step == self._seen:  # between the micro-batches of a step
            return
        self._seen = step
        stop = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
        if stop or step % self.every == 0 or step == trainer.max_steps:
            assert isinstance(pl_module, Method)
            pl_module.raise_if_nonfinite()
            trainer.save_checkpoint(self.folder / checkpoint_name(step), weights_only=False)  # the optimizer, too
        if stop:
            self.signal = self.signal or signal.SIGTERM
            trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

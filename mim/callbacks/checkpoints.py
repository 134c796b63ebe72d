"""Checkpoints at fixed steps and at signals, always between two optimizer steps."""

import signal
from pathlib import Path
from types import FrameType

from lightning import Callback, LightningModule, Trainer

from mim.checkpoint_io import checkpoint_name, nonfinite, sweep
from mim.methods import Method, NonFiniteError
from mim.processes import STOP_SIGNALS


class Signals(Callback):
    """Notes the signals that ask a run to stop and does nothing else; :class:`Checkpoints` looks at it after each step.

    Lightning's own handlers act at once, in the middle of a step or of a collective, and then wait for ever. In the end
    it gives all signals back, also after a failure.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals over in the moment in which Lightning does, between set-up and loaders."""
        connector = trainer._signal_connector
        register = connector.register_signal_handlers  # which notes whom to give them back to

        def take_over() -> None:
            register()
            for number in STOP_SIGNALS:
                signal.signal(number, self._note)

        connector.register_signal_handlers = take_over  # type: ignore[method-assign]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number


class Checkpoints(Callback):
    """Saves every ``every`` steps, after the last step, and after the step in which a signal came; that ends the run.

    Comes last among the callbacks: what the others wrote about a step is then on disk before the step's checkpoint.

    Args:
        folder: where checkpoints go.
        every: optimizer steps between two of them.
        signals: tells of signals.
    """

    def __init__(self, folder: Path, every: int, signals: Signals) -> None:
        self.folder, self.every, self.signals = folder, every, signals
        self.stopped = False
        self._seen = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the step that a resumed run starts from, and sweeps up after a killed one."""
        self._seen = trainer.global_step
        if trainer.is_global_zero and self.folder.exists():
            sweep(self.folder)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Saves if it is time; stops if a signal came to any process."""
        step = trainer.global_step
        if step == self._seen:  # between the micro-batches of a step
            return
        self._seen = step
        self.stopped = trainer.strategy.reduce_boolean_decision(self.signals.received is not None, all=False)
        if self.stopped or step % self.every == 0 or step == trainer.max_steps:
            if isinstance(pl_module, Method):
                pl_module.raise_if_nonfinite()
            broken = nonfinite(pl_module.state_dict())  # what no gradient told of, as a teacher
            if trainer.strategy.reduce_boolean_decision(bool(broken), all=False):  # shares differ
                raise NonFiniteError(step - 1, broken[0] if broken else "weights of another process")
            trainer.save_checkpoint(self.folder / checkpoint_name(step), weights_only=False)  # the optimizer, too
        if self.stopped:
            trainer.should_stop = True

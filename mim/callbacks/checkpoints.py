"""Checkpoints at fixed steps and at signals, always between two optimizer steps."""

import signal
from pathlib import Path
from types import FrameType

import torch.distributed
from lightning import Callback, LightningModule, Trainer

from mim.data.bad_files import Bad, BadFiles
from mim.distributed.processes import STOP_SIGNALS
from mim.methods import Method, NonFiniteError
from mim.run.checkpoint_files import checkpoint_name, nonfinite, sweep


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
    """Saves every ``every`` steps, after the last one, and after one that ends the run early.

    That is the step in which a signal came to any process, or in which all of them together have met too many
    unreadable files. Comes last among the callbacks: what the others wrote about a step is then on disk before the
    step's checkpoint.

    Args:
        folder: where checkpoints go.
        every: optimizer steps between two of them.
        signals: tells of signals.
        bad_files: those that this process has met; in the end all processes know them all.
    """

    def __init__(self, folder: Path, every: int, signals: Signals, bad_files: BadFiles | None = None) -> None:
        self.folder, self.every, self.signals = folder, every, signals
        self.bad_files = bad_files or BadFiles(1.0, "")
        self.stopped = False
        self._seen = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the step that a resumed run starts from, and sweeps up after a killed one.

        A run that has met too many unreadable files already ends here.
        """
        self._seen = trainer.global_step
        if trainer.is_global_zero and self.folder.exists():
            sweep(self.folder)
        self._listen(trainer)
        self.bad_files.stop_if_too_many()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Saves if it is time, or if the run ends here."""
        step = trainer.global_step
        if step == self._seen:  # between the micro-batches of a step
            return
        self._seen = step
        self._listen(trainer)
        if self.stopped or self.bad_files.too_many() or step % self.every == 0 or step == trainer.max_steps:
            if isinstance(pl_module, Method):
                pl_module.raise_if_nonfinite()
            broken = nonfinite(pl_module.state_dict())  # what no gradient told of, as a teacher
            if trainer.strategy.reduce_boolean_decision(bool(broken), all=False):  # shares differ
                raise NonFiniteError(step - 1, broken[0] if broken else "weights of another process")
            trainer.save_checkpoint(self.folder / checkpoint_name(step), weights_only=False)  # the optimizer, too
        self.bad_files.stop_if_too_many()
        if self.stopped:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judges the files that were scored, too."""
        self._listen(trainer)
        self.bad_files.stop_if_too_many()

    def _listen(self, trainer: Trainer) -> None:
        """Asks whether anything happened to any process, and only then what; all processes do so together."""
        happened = self.signals.received is not None or bool(self.bad_files.news)
        if not trainer.strategy.reduce_boolean_decision(happened, all=False):
            return
        for received, news in _of_all_processes((self.signals.received, self.bad_files.news)):
            self.stopped |= received is not None
            self.bad_files.add(*news)
        self.bad_files.news = []


def _of_all_processes(own: tuple[int | None, list[Bad]]) -> list[tuple[int | None, list[Bad]]]:
    """What every process says, ``own`` in its place; a collective."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    said = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(said, own)
    return said

"""What a few steps spend their time on: a trace for a browser, with the parts of a step by name.

Nothing of it is there unless ``--profile`` asks for it: the loop's own profiler gives the marks, so that no line of a
training step knows of them.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from mim.methods import Method
from mim.run.folder import RunFolder

FIRST = 3
"""Steps before those that are recorded: libraries start, blocks compile, workers fill their queues."""

PARTS = {
    "train_dataloader_next": "data",
    "PretrainData.on_after_batch_transfer": "views",
    "Strategy.training_step": "forward",
    "Strategy.backward": "backward",
}
"""Ends of the names by which Lightning calls what it does, and ours for it."""


class Ranges(Profiler):
    """Names the parts of a step for torch's profiler, and for NVIDIA's where there is a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[tuple[str, record_function]] = []

    def start(self, action_name: str) -> None:
        """Opens the range of an action that has one."""
        if action_name.endswith(".on_before_optimizer_step") and action_name.startswith("[LightningModule]"):
            self.enter("optimizer")
        for end, name in PARTS.items():
            if action_name.endswith(end):
                self.enter(name)

    def stop(self, action_name: str) -> None:
        """Closes it; the update is over when the whole step of the optimizer is."""
        if action_name.endswith(".optimizer_step") and action_name.startswith("[LightningModule]"):
            self.leave("optimizer")
        for end, name in PARTS.items():
            if action_name.endswith(end):
                self.leave(name)

    def enter(self, name: str) -> None:
        """Opens a range."""
        span = record_function(name)
        span.__enter__()  # type: ignore[no-untyped-call]
        self._open.append((name, span))
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]

    def leave(self, name: str) -> None:
        """Closes the newest range if it has this name; an iterator that ends, or a step that fails, leaves none."""
        if not self._open or self._open[-1][0] != name:
            return
        self._open.pop()[1].__exit__(None, None, None)
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    def around(self, update: Callable[[int], None]) -> Callable[[int], None]:
        """The update of teachers as a range of its own, after the optimizer's."""

        def after_optimizer_step(step: int) -> None:
            self.leave("optimizer")
            self.enter("teacher")
            try:
                update(step)
            finally:
                self.leave("teacher")

        return after_optimizer_step


class Profile(Callback):
    """Records some steps of a run into ``trace.json`` of its folder, by the first process alone.

    Args:
        run: the run's folder.
        steps: to record, after the first few.
    """

    def __init__(self, run: RunFolder, steps: int) -> None:
        self.run, self.steps = run, steps
        self._profiler: profile | None = None

    @property
    def file(self) -> Path:
        """The trace."""
        return self.run.path / "trace.json"

    def attach(self, trainer: Trainer) -> None:
        """Takes the place of the loop's profiler, which does nothing; before training."""
        trainer.callbacks.append(self)  # type: ignore[attr-defined]  # set by Lightning
        trainer.profiler = Ranges()  # type: ignore[attr-defined]  # as above

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for its steps."""
        assert isinstance(pl_module, Method)
        ranges = trainer.profiler  # type: ignore[attr-defined]
        assert isinstance(ranges, Ranges)
        pl_module.after_optimizer_step = ranges.around(pl_module.after_optimizer_step)  # type: ignore[method-assign, assignment]
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        plan = schedule(wait=FIRST - 1, warmup=1, active=self.steps, repeat=1)
        self._profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._profiler.start()
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Counts steps, not micro-batches."""
        if self._profiler is not None and trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self._profiler.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves nothing behind."""
        self._end(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves nothing behind."""
        self._end(pl_module)

    def _end(self, method: LightningModule) -> None:
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()
            vars(method).pop("after_optimizer_step", None)

    def _write(self, profiler: profile) -> None:
        profiler.export_chrome_trace(str(self.file))
        self.run.say(f"  trace    {self.file}   ({self.steps} steps; opens at ui.perfetto.dev or chrome://tracing)")

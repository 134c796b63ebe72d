"""What a run says while it runs: rows of metrics, TensorBoard, and one line of progress."""

import csv
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from tqdm import tqdm

from mim.atomic import replaced
from mim.methods import Method
from mim.run.folder import RunFolder
from mim.run.words import duration
from mim.terminal import watched


class MetricsTable:
    """A CSV file with a row per step and a column per metric, appended to while columns stay the same.

    Args:
        path: the file; rows that it holds already are kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[int, dict[str, str]] = {}
        self.columns = ["step", "epoch"]
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or self.columns)
                # A killed process may leave a cut line; the checkpoint it resumes from is older than that line.
                self.rows = {int(row["step"]): row for row in reader if None not in row.values()}

    def forget_after(self, step: int) -> None:
        """Drops rows beyond the step that a resumed run starts from."""
        self.rows = {number: row for number, row in self.rows.items() if number <= step}
        self._write()

    def add(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Adds values to the row of a step."""
        new = step not in self.rows and set(values) <= set(self.columns)
        row = self.rows.setdefault(step, {"step": str(step), "epoch": repr(round(epoch, 4))})
        row |= {name: repr(value) for name, value in values.items()}
        self.columns += [name for name in values if name not in self.columns]
        if new and self.path.exists():
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self._write()

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        values = [row[name] for row in self.rows.values() if row.get(name)]
        return float(values[-1]) if values else None

    def _write(self) -> None:
        with replaced(self.path) as aside, aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows[step] for step in sorted(self.rows))


class RunLog(Callback):
    """Writes what the method logged every ``every`` steps and shows where the run stands.

    ``metrics.csv`` holds what is a function of the step, equal in every repetition of the run; speeds are in
    ``timing.csv``. Both also go to TensorBoard.

    Args:
        run: the run's folder.
        every: optimizer steps between rows.
    """

    def __init__(self, run: RunFolder, every: int) -> None:
        self.run, self.every = run, every
        self.metrics = MetricsTable(run.metrics)
        self.timing = MetricsTable(run.path / "timing.csv")
        self._bar: tqdm[Any] | None = None
        self._seen = self._first = 0
        self._waited = self._since = self._idle_since = self._started = self._said = 0.0
        self._warned = False
        self._unwell = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets what an interrupted run wrote beyond its checkpoint, and starts the clocks."""
        self._seen = self._first = self._marked = trainer.global_step
        if trainer.is_global_zero:
            self.metrics.forget_after(trainer.global_step)
            self.timing.forget_after(trainer.global_step)
            if watched():
                self._bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, unit="step", dynamic_ncols=True)
        self._since = self._idle_since = self._started = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Counts the time since the last batch ended as waiting for data."""
        self._waited += time.monotonic() - self._idle_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Writes a row if it is time."""
        step = trainer.global_step
        if step != self._seen:
            self._seen = step
            if self._bar is not None:
                self._bar.update()
            if step % self.every == 0 or step == trainer.max_steps:
                assert isinstance(pl_module, Method)
                self._write(trainer, pl_module, step)
        self._idle_since = time.monotonic()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes the progress bar."""
        if self._bar is not None:
            self._bar.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent inside out of speeds and estimates."""
        start = time.monotonic()
        yield
        self._idle_since = time.monotonic()
        self._since += self._idle_since - start
        self._started += self._idle_since - start

    def _write(self, trainer: Trainer, method: Method, step: int) -> None:
        method.raise_if_nonfinite()
        values = {name: trainer.strategy.reduce(value.detach()) for name, value in trainer.callback_metrics.items()}
        if not trainer.is_global_zero:
            return
        epoch = step / method.plan.steps_per_epoch
        metrics = {name: float(value) for name, value in values.items()}
        metrics |= {"train/lr": method.learning_rate(step - 1)}
        elapsed = max(time.monotonic() - self._since, 1e-9)
        speed = {
            "images_per_second": (step - self._marked) * method.plan.batch_size / elapsed,
            "data_wait": self._waited / elapsed,
        }
        self._since, self._waited, self._marked = time.monotonic(), 0.0, step
        self.metrics.add(step, epoch, metrics)
        self.timing.add(step, epoch, speed)
        for logger in trainer.loggers:
            logger.log_metrics(metrics | speed, step)
        self._show(trainer, method, step, metrics, speed)
        if (warning := method.health_warning(metrics)) and warning != self._unwell:
            self._unwell = warning
            self.run.say(f"health  {warning}")

    def _show(
        self, trainer: Trainer, method: Method, step: int, metrics: dict[str, float], speed: dict[str, float]
    ) -> None:
        plan = method.plan
        left = (time.monotonic() - self._started) / (step - self._first) * (plan.max_steps - step)
        facts = [
            f"epoch {plan.epochs_at(step)}/{plan.epochs:g}",
            f"step {step}/{plan.max_steps}",
            f"loss {metrics.get('train/loss', math.nan):.4f}",
            f"lr {metrics['train/lr']:.1e}",
            f"{speed['images_per_second']:,.0f} img/s",
            f"data_wait {speed['data_wait']:.0%}",
            f"eta {duration(left)}",
        ]
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(facts[:1] + facts[2:-1]), refresh=False)
        elif self._due(step, plan.max_steps):
            self._said = time.monotonic()
            self.run.say(f"{time.strftime('%H:%M:%S')}  " + "  ".join(facts))
        if speed["data_wait"] > 0.2 and step - self._first >= 20 and not self._warned:
            self._warned = True
            hint = f"try --num_workers {2 * max(1, _workers(trainer))}, or tar shards on a slow disk"
            self.run.say(f"loader is the bottleneck ({speed['data_wait']:.0%} waiting): {hint}")

    def _due(self, step: int, max_steps: int) -> bool:
        """A line for every twentieth of the run, and every minute of a slow one."""
        twentieth = max(1, max_steps // self.every // 20)
        return step == max_steps or step // self.every % twentieth == 0 or time.monotonic() - self._said > 60


def _workers(trainer: Trainer) -> int:
    return int(getattr(trainer.train_dataloader, "num_workers", 0))

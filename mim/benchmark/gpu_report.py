"""Everything that a GPU has to show, part by part within its time: one JSON file and one Markdown table.

What is there is written after every part, so that a machine that is lost leaves what it has measured.
"""

import json
import os
import platform
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mim.benchmark.gpu_parts import (
    Bench,
    NotHereError,
    Row,
    cuda_graph,
    gpu_tests,
    loader,
    matrix_peak,
    resume,
    step,
    training,
    waiting,
)
from mim.benchmark.training import MatrixPeak
from mim.errors import MachineError

SECONDS = 470
"""Of all parts together."""
PATIENCE = 4
"""Times as long may it take at toy size, where a busy machine says nothing about whether the parts work."""


@dataclass
class Part:
    """A part of the report.

    Args:
        name: for tables.
        share: of the time of all.
        measure: yields its rows.

    Attributes:
        status: ``done``, ``failed``, ``out of time``, or ``not here`` where there is nothing to measure.
        why: it is not done.
        seconds: that it took.
        rows: what it has measured, up to its end or its failure.
    """

    name: str
    share: float
    measure: Callable[[Bench], Iterator[Row]]
    status: str = "done"
    why: str = ""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def take(self, bench: Bench, limit: float) -> None:
        """Measures for at most ``limit`` seconds; whatever goes wrong is noted, and is no reason to end the others."""
        start = time.perf_counter()
        try:
            with _at_most(limit):
                for row in self.measure(bench):
                    self.rows.append(row)
        except NotHereError as reason:
            self.status, self.why = "not here", str(reason)
        except OutOfTimeError:
            self.status, self.why = "out of time", f"after {limit:.0f} s"
        except Exception as error:  # noqa: BLE001, RUF100 - of whatever kind
            self.status, self.why = "failed", f"{type(error).__name__}: {error}"
        self.seconds = time.perf_counter() - start
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


class OutOfTimeError(Exception):
    """A part took longer than it may."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises inside as soon as the time is over."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def parts(bench: Bench) -> list[Part]:
    """In their order; a share that a part leaves over is for those after it, so the training takes what is left."""
    steps = [Part(f"step: {name}", 0.26 / len(bench.recipes), partial(step, name=name)) for name in bench.recipes]
    return [
        Part("matrix peak", 0.01, matrix_peak),
        Part("gpu tests", 0.12, gpu_tests),
        *steps,
        Part("loader", 0.06, loader),
        Part("CUDA graph", 0.02, cuda_graph),
        Part("nothing waits for the GPU", 0.05, waiting),
        Part("resume", 0.10, resume),
        Part("training", 0.38, training),
    ]


def take_all(chosen: Sequence[Part], bench: Bench, seconds: float, after: Callable[[Part], object]) -> None:
    """Lets every part measure within its share and what those before it have left; calls ``after`` after each."""
    start, until = time.perf_counter(), 0.0
    for part in chosen:
        until += part.share * seconds
        part.take(bench, until - (time.perf_counter() - start))
        after(part)


def gpu_report(
    device: torch.device, precision: str, file: Path, data: str | None, workers: int | None, threads: int
) -> None:
    """Measures and writes ``file`` and the same name with ``.md``.

    Raises:
        MachineError: naming the parts that failed, after all others.
    """
    toy = device.type != "cuda"
    peak = MatrixPeak(device, precision, 196 * 64, 768)
    if toy:
        peak.shapes = [(256, 256, 256)]
    workers = workers if workers is not None else 0 if toy else min(16, len(os.sched_getaffinity(0)))
    setting = {
        "device": platform.processor() or "cpu" if toy else torch.cuda.get_device_name(),
        "size": "toy: shows that the report works, and nothing of speed" if toy else "full",
        "torch": torch.__version__,
        "precision": precision,
        "threads": threads,
        "workers": workers,
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        bench = Bench(device, precision, Path(folder), peak, data, workers, seconds=1.0 if toy else 0.37 * SECONDS)
        chosen = parts(bench)

        def tell(part: Part) -> None:
            print(f"  {part.status:<12}{part.seconds:6.1f} s  {part.name}  {part.why}".rstrip(), flush=True)
            _write(file, setting, chosen[: chosen.index(part) + 1])

        take_all(chosen, bench, SECONDS * PATIENCE if toy else SECONDS, tell)
    print(f"  json     {file}\n  table    {file.with_suffix('.md')}")
    if lost := [part.name for part in chosen if part.status in ("failed", "out of time")]:
        raise MachineError(
            f"{len(lost)} of {len(chosen)} parts are not done: {', '.join(lost)}", why=chosen_why(chosen)
        )


def chosen_why(chosen: Sequence[Part]) -> str:
    """Why the first part that is not done is not."""
    return next(f"{part.name}: {part.why[:200]}" for part in chosen if part.status in ("failed", "out of time"))


def _write(file: Path, setting: dict[str, Any], taken: Sequence[Part]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    told = [{name: value for name, value in asdict(part).items() if name != "measure"} for part in taken]
    file.write_text(json.dumps({"setting": setting, "parts": told}, indent=2) + "\n")
    file.with_suffix(".md").write_text(markdown(setting, taken))


def markdown(setting: dict[str, Any], taken: Sequence[Part]) -> str:
    """The report as people read it: the setting in a line, then a table for each kind of row."""
    lines = [", ".join(f"{name} {value}" for name, value in setting.items()), ""]
    columns: list[str] = []
    for part in taken:
        for row in part.rows or [{}]:
            own = ["part", *row, *(["not done"] if part.status != "done" else [])]
            if own != columns:
                columns = own
                lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            cells = [part.name, *map(_cell, row.values())]
            cells += (
                [f"{part.status}: {part.why}".replace("\n", " ").replace("|", "/")] if part.status != "done" else []
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{sum(part.seconds for part in taken):.0f} s in all.", ""])


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

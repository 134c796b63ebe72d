"""What a run folder says, whole or still growing."""

import csv
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOSS, LR = "train/loss", "train/lr"
KNN, LINEAR, RANKME, SPREAD = "val/knn_top1", "val/linear_top1", "val/rankme", "val/feature_std"

Points = NDArray[np.float64]
"""Measurements ``(M, 2)``: step and value."""


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Args:
        folder: the run folder.
        summary: ``summary.json``, empty if there is none yet.
        metrics: columns of ``metrics.csv``, each ``(M, 2)``: step and value.
        epochs_per_step: turns steps into epochs; None if the run has not seen a whole epoch.
        unreadable: files that are there but could not be understood.
    """

    folder: Path
    summary: dict[str, Any]
    metrics: dict[str, Points]
    epochs_per_step: float | None
    unreadable: list[str]

    @property
    def title(self) -> str:
        """Method, model and what was built under its name, or the folder's name."""
        known = [str(self.summary[key]) for key in ("method", "model") if self.summary.get(key)]
        shape = f" ({self.summary['shape']})" if known and self.summary.get("shape") else ""
        return (" on ".join(known) or self.folder.name) + shape

    @property
    def where(self) -> str:
        """The folder as one would type it here."""
        return os.path.relpath(self.folder)

    def text(self, name: str) -> str:
        """A text file of the folder; empty if it is missing."""
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""

    @property
    def pool(self) -> str | None:
        """What probes measure: ``cls`` or ``mean``."""
        found = re.search("^pool: (cls|mean)$", self.text("config.yaml"), re.MULTILINE)  # older summaries do not say
        return str(self.summary.get("pool") or (found[1] if found else "")) or None

    def first(self, metric: str) -> float | None:
        """The first value of a column of ``metrics.csv``."""
        return float(self.metrics[metric][0, 1]) if metric in self.metrics else None

    def untrained(self, metric: str) -> float | None:
        """The value before the first step."""
        return self.first(metric) if metric in self.metrics and self.metrics[metric][0, 0] == 0 else None

    def when(self, step: float) -> str:
        """A step as people count it."""
        return f"epoch {step * self.epochs_per_step:.3g}" if self.epochs_per_step else f"step {step:g}"

    def best(self, metric: str) -> tuple[float, float] | None:
        """Step and value of the highest measurement after the first step."""
        points = self.metrics.get(metric, np.zeros((0, 2)))
        points = points[(points[:, 0] > 0) & np.isfinite(points[:, 1])]
        return (float(points[points[:, 1].argmax(), 0]), float(points[:, 1].max())) if len(points) else None

    @property
    def origin(self) -> str:
        """What the encoder was before the first step, in a word."""
        return "start" if self.summary.get("start") else "untrained"

    def last(self, key: str, metric: str) -> float | None:
        """The number that the summary gives, or the newest measurement of a run that still goes on."""
        newest = float(self.metrics[metric][-1, 1]) if metric in self.metrics else None
        return newest if self.summary.get(key) is None else to_float(self.summary[key])


def read_run(folder: Path) -> Run:
    """Reads what the page is made of; never fails because a file is missing or half written."""
    unreadable: list[str] = []
    summary = read_json(folder / "summary.json", unreadable)
    metrics = read_metrics(folder / "metrics.csv")
    epochs = metrics.pop("epoch", np.zeros((0, 2)))
    scale = None
    if epochs.size and epochs[:, 1].max() >= 1:
        # The column may count whole epochs: the first step of the last one is where both are known exactly.
        step, epoch = epochs[epochs[:, 1].argmax()]
        scale = float(epoch / step) if step else None
    return Run(folder, summary, metrics, scale, unreadable)


def read_json(path: Path, unreadable: list[str]) -> dict[str, Any]:
    """A JSON object, or an empty one and a note."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        unreadable.append(f"{path.name}: {error}")
        return {}
    return content if isinstance(content, dict) else {}


def read_metrics(path: Path) -> dict[str, Points]:
    """Columns of a wide CSV file, each ``(M, 2)`` sorted by step; empty cells were not measured."""
    columns: dict[str, list[tuple[float, float]]] = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8", errors="replace") as lines:
            for row in csv.DictReader(lines):
                step = to_float(row.pop("step", None))
                for name, cell in row.items():
                    value = to_float(cell)
                    if step is not None and value is not None:
                        columns.setdefault(name, []).append((step, value))
    return {name: np.array(sorted(points, key=lambda point: point[0])) for name, points in columns.items()}


def to_float(cell: object) -> float | None:
    """A number, possibly NaN; None for anything else, such as the half line that a running job just writes."""
    try:
        return float(cell) if isinstance(cell, str | int | float) else None
    except ValueError:
        return None

"""Which classes are taken for which, as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

_NAMED = 40
"""Up to so many classes are named at the sides; up to half as many have their share written into the cells."""
_INK = "#7a7a7a"


def save_confusion(counts: NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """Writes a PNG of the share of each class's images (row) that was taken for each class (column).

    Args:
        counts: ``(classes, classes)`` images of the row's class that were taken for the column's.
        classes: their names.
        path: where to.
    """
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    named = len(classes) <= _NAMED
    side = min(11.0, 3.0 + 0.45 * len(classes)) if named else 8.0
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="inferno", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("taken for", color=_INK)
    axes.set_ylabel("is", color=_INK)
    if named:
        axes.set_xticks(range(len(classes)), classes, rotation=90, color=_INK)
        axes.set_yticks(range(len(classes)), classes, color=_INK)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    if len(classes) <= _NAMED // 2:
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.005:
                ink = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=8)
    figure.savefig(path, transparent=True)

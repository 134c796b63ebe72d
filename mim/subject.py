"""What an evaluation measures, and on what: the options that all evaluations of image classification share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Subject:
    """Weights to measure and labelled images to measure them on.

    Args:
        weights: run folder, timm folder, checkpoint file or timm name.
        data: folder with train/ and val/ (or test/), folder of class folders, labelled list or tar shards, builtin or
            shapes.
        model: timm name of the model that a checkpoint file belongs to, if its shapes do not tell.
        img_size: pixels per side instead of the model's own; positions are resized.
        crop_pct: side of the scored middle as a share of the resized image's shorter side; the papers use 0.875, 224
            of 256 pixels.
        val_fraction: share of each class that is held out and scored if the data sets nothing apart.
        classes: same, or common to score those that both parts have.
        max_bad: share of unreadable files that is tolerated.
        batch_size: images encoded at once.
        num_workers: loader processes; one per core unless given.
        device: where to compute; auto takes a GPU if there is one.
        cache: folder of features that were computed before; safe to delete.
        out: folder for the results; inside the run that the weights belong to unless given.
        trust: load a checkpoint file although it can run code.
    """

    weights: str
    data: str = "builtin"
    model: str | None = None
    img_size: int | None = None
    crop_pct: float = 1.0
    val_fraction: float = 0.2
    classes: Literal["same", "common"] = "same"
    max_bad: float = 0.01
    batch_size: int = 64
    num_workers: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache: Path = Path("runs/features")
    out: str | None = None
    trust: bool = False

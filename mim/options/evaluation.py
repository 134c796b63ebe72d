"""What every evaluation asks for: weights, images, a machine. Torch is not needed to say it."""

from dataclasses import dataclass
from typing import Literal

from mim.options.ranges import Count, Processes, Threads

Scores = dict[str, dict[str, list[float]]]
"""What an evaluation gives: shares of 1 by what was measured, then by encoder (``pretrained``, ``untrained``), a value
per seed."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Weights to measure, images to measure them on, and where the results go.

    Args:
        weights: run folder, timm folder, checkpoint file or timm name.
        data: images with labels or masks; builtin or shapes need no download.
        model: timm name of the model that a checkpoint file belongs to, if its shapes do not tell.
        num_workers: loader processes; one per core unless given.
        device: where to compute; auto takes a GPU if there is one.
        threads: CPU threads; torch's choice unless given.
        out: folder for the results; inside the run that the weights belong to unless given.
        trust: load a checkpoint file although it can run code.
        reduction: shortens the token sequence in the encoder: a name such as tome or evit, with what its knob is set
            to as in tome:8 or evit:0.7 (half of the multiply-adds unless given), a YAML file, or a folder with a
            trained one.
    """

    weights: str
    data: str = "builtin"
    model: str | None = None
    num_workers: Processes | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Threads | None = None
    out: str | None = None
    trust: bool = False
    reduction: str | None = None


@dataclass(frozen=True)
class TrainingOptions:
    """What a training with labels runs on, and whether it goes on where it was stopped.

    Args:
        devices: to train on together.
        accumulate: micro-batches per step: same result, less memory.
        precision: auto is bf16-mixed on a GPU that has it.
        resume: go on where the same command was stopped, in the run that the weights belong to or in --out.
    """

    devices: Count | Literal["auto"] = 1
    accumulate: Count = 1
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    resume: bool = False

"""Accuracy over speed of fine-tuned reductions: ``python tools/pareto_finetuned.py --finetuned runs/small``."""

from pathlib import Path
from typing import Literal

from mim.options.ranges import Count, Threads


def run(
    finetuned: Path,
    batch_size: Count = 8,
    rounds: Count = 10,
    threads: Threads | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: str | None = None,
) -> None:
    """Time what fine-tunings with and without token reductions have exported, and draw what they reached over that.

    Args:
        finetuned: a run, or a folder of results, in which an encoder was fine-tuned with and without reductions.
        batch_size: images of a timed forward pass, which are noise.
        rounds: turns of each, after two that are not counted.
        threads: processor threads; all unless given.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for the page; inside the run unless given.
    """
    from mim.benchmark.pareto_finetuned import collect
    from mim.benchmark.pareto_page import write
    from mim.benchmark.results import prepare
    from mim.run.folder import evaluation_folder

    points, words = collect(finetuned, prepare(device, threads), batch_size, rounds)
    write(points, evaluation_folder(str(finetuned), out, "pareto-finetuned"), words, {"finetuned": str(finetuned)})

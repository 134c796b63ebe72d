"""Semantic segmentation: ``python tools/segment.py --weights runs/001-mae-photos --data my_masks``."""

from mim.distributed.processes import INTERRUPTED, process_rank
from mim.options.ranges import Count
from mim.options.segmentation import HeadRecipe, MaskedSubject, Scoring, check


def run(
    subject: MaskedSubject, recipe: HeadRecipe, scoring: Scoring, resume: bool = False, save_every: Count = 1000
) -> None:
    """Trains a segmentation head, or the whole encoder, and scores it beside an encoder that was never trained.

    Args:
        subject: weights and images.
        recipe: how the head learns.
        scoring: how images are scored.
        resume: go on where the same command was stopped, in the run that the weights belong to or in --out.
        save_every: steps between two checkpoints, of which two are kept while a head trains.
    """
    check(subject, recipe, scoring)
    # torch is imported when there is something to measure: --help must not wait for it.
    from mim.transfer.segmentation import Segmentation
    from mim.transfer.training import StoppedError

    segmentation = Segmentation(subject, recipe, scoring)
    if process_rank() == 0:
        segmentation.introduce()
    try:
        segmentation.measure(resume, save_every)
    except StoppedError:
        print("stopped by a signal, saved; go on with  --resume true")
        raise SystemExit(INTERRUPTED) from None

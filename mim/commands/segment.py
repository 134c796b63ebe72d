"""Semantic segmentation: ``python tools/segment.py --weights runs/001-mae-photos --data my_masks``."""

from mim.processes import process_rank
from mim.segment_options import HeadRecipe, MaskedSubject, Scoring


def run(subject: MaskedSubject, recipe: HeadRecipe, scoring: Scoring) -> None:
    """Trains a segmentation head, or the whole encoder, and scores it beside an encoder that was never trained.

    Args:
        subject: weights and images.
        recipe: how the head learns.
        scoring: how images are scored.
    """
    # torch is imported when there is something to measure: --help must not wait for it.
    from mim.segmenting import Segmentation

    segmentation = Segmentation(subject, recipe, scoring)
    if process_rank() == 0:
        segmentation.introduce()
    segmentation.measure()

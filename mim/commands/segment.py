"""Semantic segmentation: ``python tools/segment.py --weights runs/001-mae-photos --data my_masks``."""

from mim.segment_options import HeadRecipe, MaskedSubject, Scoring


def run(subject: MaskedSubject, recipe: HeadRecipe, scoring: Scoring) -> None:
    """Trains a segmentation head, or the whole encoder, and scores it beside an encoder that was never trained.

    Args:
        subject: weights and images.
        recipe: how the head learns.
        scoring: how images are scored.
    """
    # torch is imported when there is something to measure: --help must not wait for it.
    import os

    from mim.segmenting import Segmentation

    segmentation = Segmentation(subject, recipe, scoring)
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        segmentation.introduce()
    segmentation.measure()

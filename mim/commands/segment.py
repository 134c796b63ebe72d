"""Semantic segmentation: ``python tools/segment.py --weights runs/001-mae-photos --data my_masks``."""

from mim.options.evaluation import Scores, TrainingOptions
from mim.options.ranges import Count
from mim.options.segmentation import Scoring, SegmentationOptions, SegmentationRecipe, check


def run(
    options: SegmentationOptions,
    recipe: SegmentationRecipe,
    scoring: Scoring,
    training: TrainingOptions,
    save_every: Count = 1000,
) -> Scores:
    """Trains a segmentation head, or the whole encoder, and scores it beside an encoder that was never trained.

    Args:
        options: weights and images.
        recipe: how the head learns.
        scoring: how images are scored.
        training: on what.
        save_every: steps between two checkpoints, of which two are kept while a head trains.
    """
    check(options, recipe, scoring)
    # torch is imported when there is something to measure: --help must not wait for it.
    from mim.transfer.segmentation import Segmentation

    segmentation = Segmentation(options, recipe, scoring, training)
    if segmentation.is_main_process:
        print(f"  protocol {segmentation.protocol()}", flush=True)
    return segmentation.measure(save_every)

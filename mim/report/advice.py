"""What the numbers of a run warn of, in sentences, and what to do about it."""

import math

import numpy as np

from mim.report.markup import number, percent
from mim.report.record import KNN, LINEAR, RANKME, SPREAD, Run

_FALLEN = 0.7  # of its highest value: a RankMe below that has fallen
_FLAT = 0.1  # a spread below that is close to none
_NOTICED = 0.02  # of accuracy: smaller differences are luck of the draw, whatever the number of images


def advice(run: Run) -> list[str]:
    """A sentence per sign of trouble, in the order in which to look at them; empty for a healthy run."""
    return [
        *filter(
            None, [_spread(run), _rank(run), *(_accuracy(run, *kind) for kind in (("k-NN", KNN), ("Linear", LINEAR)))]
        )
    ]


def _spread(run: Run) -> str:
    value = run.last("feature_std", SPREAD)
    if value is None or not value < _FLAT:
        return ""
    return (
        f"The features of all images point almost the same way (spread {number(value)}, 1 is even): "
        "they have collapsed, or nearly. Lower the learning rate (--blr) or lengthen the warm-up; with a teacher, "
        "raise its momentum or its temperature's warm-up."
    )


def _rank(run: Run) -> str:
    points = run.metrics.get(RANKME)
    if points is None or len(points) < 2:
        return ""
    highest, last = points[np.nanargmax(points[:, 1])], points[-1]
    if not last[1] < _FALLEN * highest[1]:
        return ""
    return (
        f"RankMe has fallen from {number(highest[1])} ({run.when(highest[0])}) to {number(last[1])}: "
        "the features use fewer directions than before. If k-NN or the linear probe fall with it, "
        "use the model of the earlier epoch, a lower learning rate or fewer epochs; if they rise, nothing is wrong."
    )


def _accuracy(run: Run, name: str, metric: str) -> str:
    points = run.metrics.get(metric)
    if points is None or len(points) < 2 or not np.isfinite(points[-1, 1]):
        return ""
    first, last, best = points[0], points[-1], points[np.nanargmax(points[:, 1])]
    if points[0, 0] == 0 and last[1] < first[1] - _noise(run, first[1]):
        return (
            f"{name} accuracy is below that of the {run.origin} encoder: {percent(last[1])} after {percent(first[1])}. "
            "So far the run has made these features worse for this task: train longer before changing anything else, "
            "or choose a method whose frozen features are usable (docs/methods.md)."
        )
    if last[1] < best[1] - _noise(run, best[1]):
        return (
            f"{name} accuracy has fallen since {run.when(best[0])}: {percent(best[1])} then, {percent(last[1])} now. "
            "Fewer epochs or a lower learning rate would have kept it; the checkpoints of that time may be gone, "
            "--save_every keeps more."
        )
    return ""


def _noise(run: Run, share: float) -> float:
    """Two standard errors of the difference of two accuracies on as many images as the run asks, at least 2 points."""
    asked = sum((run.summary.get("probe") or {}).get("images_per_class", {}).values()) or 400
    return max(_NOTICED, 2 * math.sqrt(2 * share * (1 - share) / asked))

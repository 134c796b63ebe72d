"""Accuracy where classes differ in size: top-1 of a large class hides what becomes of the small ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

UNEVEN = 1.5
"""Times the smallest class's images above which the largest makes a data set uneven."""


def balanced_accuracy(answers: Tensor, labels: Tensor) -> float:
    """Mean over classes of the share of a class's images that is answered right.

    Args:
        answers: ``(Q,)`` predicted classes; one that cannot be, as -1, is wrong.
        labels: ``(Q,)`` true classes from 0; classes without an image do not count.

    Returns:
        A share from 0 to 1.
    """
    classes, place, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    right = torch.zeros(len(classes), dtype=torch.float64, device=labels.device)
    right.index_add_(0, place, (answers == labels).double())
    return float((right / counts).mean())


def balanced_of(taken_for: Tensor) -> float:
    """:func:`balanced_accuracy` of ``(classes, classes)`` counts, truth by answer."""
    counts = taken_for.sum(1)
    recall = taken_for.diagonal().double() / counts
    return float(recall[counts > 0].mean())


def right_per_class(answers: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, int]:
    """How many images of each class are answered right, in the classes' order; arguments as above."""
    return images_per_class(labels.to(answers.device)[answers == labels.to(answers.device)], classes)


def images_per_class(labels: Sequence[int] | Tensor, classes: Sequence[str]) -> dict[str, int]:
    """How many images each class has, in the classes' order; a label of -1, an unreadable image's, does not count."""
    values = torch.as_tensor(labels, dtype=torch.int64).cpu()
    counts = values[values >= 0].bincount(minlength=len(classes))
    return dict(zip(classes, counts.tolist(), strict=True))


def uneven(counts: dict[str, int]) -> bool:
    """Whether a class has no image, or the largest more than :data:`UNEVEN` times the smallest."""
    return bool(counts) and max(counts.values()) > UNEVEN * min(counts.values())

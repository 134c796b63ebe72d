"""Splits of labelled features that depend on a key alone."""

import torch
from torch import Tensor

from mim.randomness import keyed_generator


def stratified_split(labels: Tensor, share: float, *key: int | str) -> tuple[Tensor, Tensor]:
    """Rows to keep and rows to hold out, the same share of every class.

    A class keeps at least one image and, if it has two or more, gives at least one.

    Args:
        labels: ``(M,)`` labels from 0.
        share: of each class to hold out, between 0 and 1.
        key: what the split is for; another key gives another split.

    Returns:
        Ascending row numbers, kept ``(M - H,)`` and held out ``(H,)``, on the labels' device.

    Raises:
        ValueError: if every class has one image only.
    """
    values = labels.cpu()
    order = torch.randperm(len(values), generator=keyed_generator(*key))
    order = order[values[order].argsort(stable=True)]  # class by class, shuffled inside
    ordered, counts = values[order], values.bincount()
    rank = torch.arange(len(values)) - (counts.cumsum(0) - counts)[ordered]  # position inside its class
    held_count = (share * counts).round().clamp(min=1).minimum(counts - 1)
    held = rank < held_count[ordered]
    if not held.any():
        raise ValueError(f"nothing to hold out: none of the {len(counts)} classes has two images")
    return order[~held].sort().values.to(labels.device), order[held].sort().values.to(labels.device)

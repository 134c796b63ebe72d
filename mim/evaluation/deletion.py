"""The deletion test of explanations: what a classifier still answers when more and more patches turn grey."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.randomness import RowGenerator

SHARES = tuple(tenth / 10 for tenth in range(1, 10))
"""Of the patches that are grey."""


@torch.no_grad()
def deletion_curve(
    classify: Callable[[Tensor], Tensor],
    images: Tensor,
    importance: Tensor,
    most_important_first: bool,
    shares: Sequence[float] = SHARES,
) -> Tensor:
    """Share of images that keep their answer, ``(len(shares),)``.

    Args:
        classify: images to logits ``(B, classes)``.
        images: ``(B, C, H, W)``, normalised, so that 0 is the mean colour.
        importance: ``(B, h, w)``; of equally important patches the first in raster order is deleted first.
        most_important_first: delete these first, which a good explanation makes harmful; otherwise last.
        shares: of the patches that are deleted.
    """
    answers = classify(images).argmax(dim=1)
    order = importance.flatten(1).argsort(dim=1, descending=most_important_first, stable=True)  # (B, N)
    rank = order.argsort(dim=1)  # of each patch among those to be deleted
    kept = []
    for share in shares:
        grey = (rank < round(share * rank.shape[1])).view_as(importance).float()
        hidden = F.interpolate(grey[:, None], images.shape[2:], mode="nearest").bool()
        kept.append((classify(images.masked_fill(hidden, 0.0)).argmax(dim=1) == answers).float().mean())
    return torch.stack(kept)


def area(curve: Tensor) -> float:
    """Under a curve over equally spaced shares, which begins at 1 where nothing is deleted: its mean by trapezoids."""
    whole = torch.cat([curve.new_ones(1), curve])
    return float(torch.trapezoid(whole) / len(curve))


def random_importance(images: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """``(B, h, w)``: what an explanation must do better than."""
    return RowGenerator.for_rows(seed, 0, images).rand(*grid)

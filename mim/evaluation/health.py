"""Label-free health of features: have they collapsed to a point or a few directions?"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rankme(features: Tensor) -> float:
    """Effective rank of the features: exponential of the entropy of their singular values (RankMe, arXiv:2210.02885).

    Not centred, as in the paper. It grows with the number of images: compare at equal numbers (the paper takes 25,600).

    Args:
        features: ``(M, D)``.

    Returns:
        From 1, one direction holds everything, to ``min(M, D)``, all directions are equally strong.
    """
    values = torch.linalg.svdvals(features.float())  # (min(M, D),)
    share = values / values.sum() + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def feature_std(features: Tensor) -> float:
    """Spread of the directions of the features, as SimSiam watches it (arXiv:2011.10566, fig. 2).

    Args:
        features: ``(M, D)``; brought to length 1 first.

    Returns:
        Standard deviation over images, mean over dimensions, times the square root of D: 1 for directions spread evenly
        over the sphere, 0 if all images have the same one.
    """
    directions = F.normalize(features.float(), dim=1)
    return float(directions.std(0, correction=0).mean()) * math.sqrt(features.shape[1])


def health_message(rank: float, dim: int, images: int) -> str | None:
    """A warning if the effective rank is under 5 % of what it could be, otherwise nothing.

    Args:
        rank: from :func:`rankme`.
        dim: width D of the features.
        images: number of images M it was measured on; no rank is larger.
    """
    if rank >= 0.05 * min(dim, images):
        return None
    return (
        f"features use {rank:.1f} of {min(dim, images)} directions (rankme): collapse? "
        "If it stays so, lower the learning rate or lengthen the warm-up"
    )

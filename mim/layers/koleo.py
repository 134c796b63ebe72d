"""KoLeo: points of a batch keep away from their nearest neighbours (arXiv:1806.03198), as in DINOv2."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.distributed.collectives import gather_rows, own_rows

_CLOSE = 1e-6
"""Unit vectors nearer than this are equal up to rounding."""


def koleo(tokens: Tensor, neighbours: Literal["batch", "process"] = "batch") -> Tensor:
    """Mean of minus the logarithm of the distance to the nearest neighbour, in float32, a scalar.

    Deviation: tokens that are equal up to rounding, such as those of a file and its copy, do not push each other; the
    direction would be noise and the gradient ten million times too long.

    Args:
        tokens: ``(B, D)``, at least two rows in all; their lengths do not count.
        neighbours: among whom the nearest is looked for: the images of all processes, or those of this one.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        points = F.normalize(tokens.float(), dim=-1)
        others = gather_rows(points) if neighbours == "batch" else points  # (B', D)
        own = own_rows(len(points)) if neighbours == "batch" else slice(len(points))
        with torch.no_grad():
            products = points @ others.T  # (B, B')
            itself = torch.arange(len(others), device=points.device)[own, None]  # (B, 1)
            nearest = products.scatter(1, itself, -torch.inf).argmax(dim=1)
        distance = torch.linalg.vector_norm(points - others[nearest], dim=-1)
        crowding: Tensor = -distance.clamp(min=_CLOSE).log().mean()
        return crowding

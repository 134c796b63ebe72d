"""Vectors kept near a standard normal distribution: sketched isotropic Gaussian regularisation (arXiv:2511.08544)."""

import torch
from torch import Tensor

from mim.distributed.collectives import gather_rows

_KNOTS, _REACH = 17, 3.0


def sigreg(vectors: Tensor, directions: Tensor) -> Tensor:
    """How far the images' vectors are from standard normal, by the characteristic functions of their projections.

    Each direction's projections are held against the normal distribution by the Epps-Pulley statistic: the squared
    distance of the two characteristic functions, integrated with a Gaussian weight. The images of all processes count.

    Args:
        vectors: ``(B, V, d)``; each of the ``V`` is judged over the images by itself.
        directions: ``(d, A)`` of length 1, the same in all processes.

    Returns:
        A scalar, the mean over ``V`` and directions: about 1 for normal vectors, and growing with ``B`` for others.
    """
    vectors = gather_rows(vectors.float())
    places = torch.arange(_KNOTS, device=vectors.device)
    knots = places * (_REACH / (_KNOTS - 1))
    normal = (-knots.square() / 2).exp()  # characteristic function, and weight
    ends = (places == 0) | (places == _KNOTS - 1)
    weights = torch.where(ends, 1.0, 2.0) * (_REACH / (_KNOTS - 1))  # trapezoids, of both sides of 0
    with torch.autocast(vectors.device.type, enabled=False):
        angles = (vectors @ directions)[..., None] * knots  # (B, V, A, knots)
        error = (angles.cos().mean(dim=0) - normal).square() + angles.sin().mean(dim=0).square()
        return len(vectors) * (error @ (weights * normal)).mean()

"""Masks between almost nothing and everything: the ratios of MaskGIT (arXiv:2202.04200)."""

import math

from torch import Tensor

from mim.masking.base import Masking
from mim.randomness import RowGenerator


class CosineMasking(Masking):
    """Hides random patches, of every image the share ``cos(u * pi / 2)`` with ``u`` uniform on [0, 1): mean 0.64.

    ``ceil(N * share)`` patches are hidden, one at least and all of them at most, as in drawing an image from nothing.
    """

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True = hidden; see :meth:`Masking.draw`."""
        patches = grid[0] * grid[1]
        share = (generator.rand(1)[:, 0] * (math.pi / 2)).cos()
        count = (share * patches).ceil().clamp(1, patches)  # (B,)
        ranks = generator.rand(patches).argsort(dim=1, stable=True).argsort(dim=1)
        return ranks < count[:, None]

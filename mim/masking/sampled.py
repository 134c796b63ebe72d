"""Visible patches drawn by their probabilities, without replacement: how AdaMAE samples (arXiv:2211.09120)."""

from typing import ClassVar

from torch import Tensor

from mim.masking.uniform import RandomMasking, all_but_smallest
from mim.randomness import RowGenerator

_TINY = 2.0**-25  # half a step of the uniform numbers, which may be 0


class SampledMasking(RandomMasking):
    """Hides the same share of every image by chance, a patch the more likely the higher its score.

    Visible patches are drawn one by one among those that are left, each with odds ``exp(-score)``. With equal scores
    that is ``RandomMasking``.

    Args:
        ratio: share of patches to hide, in [0, 1). Exactly ``int(N * (1 - ratio))`` stay visible.
    """

    guided: ClassVar[bool] = True

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True = hidden; see :meth:`Masking.draw`."""
        assert scores is not None  # forward has looked
        patches = grid[0] * grid[1]
        # The first of independent exponential waiting times, with rates exp(-score), are such a draw.
        waiting = (-generator.rand(patches).clamp(min=_TINY).log()).log() + scores  # (B, N), logarithms
        return all_but_smallest(waiting, self.visible_count(patches))

"""Uniform random masking, the policy of MAE (arXiv:2111.06377)."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from mim.errors import UserError
from mim.masking.base import Masking, check_ratios
from mim.randomness import RowGenerator


class RandomMasking(Masking):
    """Hides the same share of every image, all sets of patches being equally likely.

    Args:
        ratio: share of patches to hide, in [0, 1); MAE uses 0.75. Exactly ``int(N * (1 - ratio))`` stay visible.
    """

    ratio_settings: ClassVar[tuple[str, ...]] = ("ratio",)

    def __init__(self, ratio: float = 0.75) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio {ratio} is outside [0, 1): some patches must stay visible")
        self.ratio = ratio

    def visible_count(self, patches: int) -> int:
        """``int(patches * (1 - ratio))``, truncated in floats as in the reference.

        Raises:
            UserError: if that is none.
        """
        visible = int(patches * (1 - self.ratio))
        if not visible:
            highest = math.floor(100 - 100 / patches) / 100  # that leaves a patch
            raise UserError(
                f"ratio {self.ratio} hides all {patches} patches", hint=f"--mask_ratio {highest:g}   or larger images"
            )
        return visible

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True = hidden; see :meth:`Masking.draw`."""
        patches = grid[0] * grid[1]
        noise = generator.rand(patches)  # (B, N)
        return all_but_smallest(noise, self.visible_count(patches))


class VaryingRandomMasking(Masking):
    """Hides random patches, of every image another share; the "rand" variant of iBOT (arXiv:2111.07832).

    Args:
        low: smallest ratio.
        high: largest ratio; each image draws its own between the two and hides exactly ``int(N * ratio)`` patches.
        unmasked_share: share of the images in which nothing is hidden.
    """

    ratio_settings: ClassVar[tuple[str, ...]] = ("low", "high")

    def __init__(self, low: float = 0.65, high: float = 0.75, unmasked_share: float = 0.5) -> None:
        super().__init__()
        check_ratios(low, high, unmasked_share)
        self.low, self.high, self.unmasked_share = low, high, unmasked_share

    def most_hidden(self, patches: int) -> int:
        """``int(patches * high)``."""
        return int(patches * self.high)

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True = hidden; see :meth:`Masking.draw`."""
        patches = grid[0] * grid[1]
        gate, share = generator.rand(2).unbind(1)
        count = ((self.low + (self.high - self.low) * share) * patches).long() * (gate >= self.unmasked_share)  # (B,)
        ranks = generator.rand(patches).argsort(dim=1, stable=True).argsort(dim=1)
        return ranks < count[:, None]


def all_but_smallest(values: Tensor, count: int) -> Tensor:
    """``(B, N)`` bool, True except at the ``count`` smallest of every row of ``values (B, N)``."""
    order = values.argsort(dim=1, stable=True)
    return torch.ones_like(values, dtype=torch.bool).scatter(1, order[:, :count], False)

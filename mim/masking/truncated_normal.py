"""Shares drawn from a bell: the masks of MAGE (arXiv:2211.09117) and SeiT++ (arXiv:2312.10105)."""

import math
from statistics import NormalDist
from typing import ClassVar

from torch import Tensor

from mim.masking.base import Masking
from mim.masking.uniform import all_but_smallest
from mim.randomness import RowGenerator


class TruncatedNormalMasking(Masking):
    """Hides random patches, equally many of all images of a step; their share is drawn from a cut normal distribution.

    Args:
        mean: of the distribution before it is cut.
        std: as ``mean``.
        low: smallest share; ``ceil(N * share)`` patches are hidden.
        high: largest share; 1 hides everything now and then.
    """

    ratio_settings: ClassVar[tuple[str, ...]] = ("low", "high")

    def __init__(self, mean: float = 0.45, std: float = 0.25, low: float = 0.4, high: float = 1.0) -> None:
        super().__init__()
        if not 0 < low <= high <= 1 or not std > 0:
            raise ValueError(f"need 0 < low <= high <= 1 and std > 0, not low {low}, high {high}, std {std}")
        self.mean, self.std, self.low, self.high = mean, std, low, high

    def visible_count(self, patches: int) -> int | None:
        """Known only if all steps hide the same share."""
        return patches - self.hidden_count(self.low, patches) if self.low == self.high else None

    @staticmethod
    def hidden_count(share: float, patches: int) -> int:
        """``ceil(patches * share)``; a share such as 0.28 of 25 is 7, whatever floats make of the product."""
        return math.ceil(patches * share - 1e-9)

    def share(self, number: float) -> float:
        """The share at ``number`` on [0, 1) of the cumulative distribution between ``low`` and ``high``."""
        if self.low == self.high:
            return self.low
        bell = NormalDist(self.mean, self.std)
        first, last = bell.cdf(self.low), bell.cdf(self.high)
        place = min(max(first + (last - first) * number, 1e-12), 1 - 1e-12)
        return min(max(bell.inv_cdf(place), self.low), self.high)

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True = hidden; see :meth:`Masking.draw`."""
        patches = grid[0] * grid[1]
        count = self.hidden_count(self.share(*generator.common(1)), patches)
        return all_but_smallest(generator.rand(patches), patches - count)

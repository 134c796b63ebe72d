"""AttMask: hide what the teacher attends to (arXiv:2203.12719, 2022).

Deviation: revealing nothing is allowed; the reference stops with an error where the share to reveal rounds to 0.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from mim.masking.base import Masking, check_ratios
from mim.randomness import RowGenerator


class AttentionMasking(Masking):
    """Hides the patches with the highest scores, such as a teacher's attention; one ratio for all images of a step.

    Args:
        mode: ``high`` hides the most attended patches, ``hint`` reveals some of the very highest at random, ``low``
            hides the least attended ones, which is the paper's counter-example.
        low: smallest ratio.
        high: largest ratio; each step draws its own between the two.
        unmasked_share: share of the images in which nothing is hidden.
        show_max: with ``hint``, the share of patches among which some are revealed; how many is a second draw of the
            ratio, times this share.
    """

    guided: ClassVar[bool] = True
    ratio_settings: ClassVar[tuple[str, ...]] = ("low", "high")

    def __init__(
        self,
        mode: Literal["high", "hint", "low"] = "high",
        low: float = 0.1,
        high: float = 0.5,
        unmasked_share: float = 0.5,
        show_max: float = 0.1,
    ) -> None:
        super().__init__()
        if mode not in ("high", "hint", "low"):
            raise ValueError(f"mode {mode} is none of high, hint and low")
        check_ratios(low, high, unmasked_share)
        if not 0 <= show_max <= 1:
            raise ValueError(f"show_max {show_max} is no share of the patches")
        self.mode, self.show_max = mode, show_max
        self.low, self.high, self.unmasked_share = low, high, unmasked_share

    def visible_count(self, patches: int) -> int | None:
        """Known only if every image hides by the same ratio, and no hint falls on what is visible anyway."""
        if self.unmasked_share or self.low != self.high or (self.mode == "hint" and self.show_max > self.low):
            return None
        revealed = int(patches * self.show_max * self.high) if self.mode == "hint" else 0
        return patches - int(patches * self.high) + revealed

    def most_hidden(self, patches: int) -> int:
        """``int(patches * high)``, truncated in floats as in the reference."""
        return int(patches * self.high)

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True = hidden; see :meth:`Masking.draw`."""
        assert scores is not None  # forward has looked
        patches = grid[0] * grid[1]
        ratio, shown = (self.low + (self.high - self.low) * number for number in generator.common(2))
        gate = generator.rand() >= self.unmasked_share  # (B,)
        rank = torch.arange(patches, device=scores.device)
        ranked = (rank < int(patches * ratio)) & gate[:, None]  # (B, N) from the first to be hidden to the last
        if self.mode == "hint":
            noise = generator.rand(int(patches * self.show_max))  # (B, top)
            revealed = noise.argsort(dim=1).argsort(dim=1) < int(patches * self.show_max * shown)
            ranked[:, : noise.shape[1]] &= ~revealed
        if self.mode == "low":
            scores = scores.masked_fill(scores == -torch.inf, torch.inf)
        order = scores.argsort(dim=1, descending=self.mode != "low", stable=True)
        return torch.empty_like(ranked).scatter(1, order, ranked)

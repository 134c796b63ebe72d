"""Masks that hide more and more of the hardest patches: the policy of HPM (arXiv:2304.05919)."""

from torch import Tensor

from mim.masking.uniform import RandomMasking, all_but_smallest
from mim.randomness import RowGenerator
from mim.schedules import linear


class HardPatchMasking(RandomMasking):
    """Hides the same share of every image: the highest-scored patches first, and a random choice of all others.

    The part that goes to the hardest changes in a straight line over the run, from ``start`` to ``end``: easy to hard
    unless set otherwise.

    Args:
        ratio: share of patches to hide, in [0, 1); HPM uses 0.75. Exactly ``int(N * (1 - ratio))`` stay visible.
        start: share of the hidden patches that are the hardest, at the start of the run; 0 in the paper.
        end: the same at the end; 0.5 in the paper. With ``start`` and ``end`` 0 masks are random and need no scores.
        stairs: equal steps in which the share moves, reaching ``end`` in the last of them; the reference has one per
            epoch. It moves at every step of the run if not given.
    """

    guided = True

    def __init__(self, ratio: float = 0.75, start: float = 0.0, end: float = 0.5, stairs: int | None = None) -> None:
        super().__init__(ratio)
        if not 0 <= start <= 1 or not 0 <= end <= 1:
            raise ValueError(f"the share of hardest patches lies in [0, 1], not from {start} to {end}")
        if stairs is not None and stairs < 1:
            raise ValueError(f"stairs {stairs}: there must be at least one")
        self.start, self.end, self.stairs = start, end, stairs

    @property
    def needs_scores(self) -> bool:
        """Whether anything but chance decides at any time of the run."""
        return max(self.start, self.end) > 0

    def hard_count(self, patches: int, progress: float) -> int:
        """How many of the hidden ones among ``patches`` are the hardest, truncated as in the reference."""
        if self.stairs:
            # Rounding must not put the first step of a stair on the one before.
            progress = min(int(progress * self.stairs + 1e-6) + 1, self.stairs) / self.stairs
        return int((patches - self.visible_count(patches)) * linear(progress, self.start, self.end))

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True = hidden; see :meth:`Masking.draw`. Of equal scores the first in raster order wins."""
        patches = grid[0] * grid[1]
        noise = generator.rand(patches)  # (B, N), below 1
        if hard := self.hard_count(patches, progress):
            assert scores is not None  # forward has looked
            hardest = scores.argsort(dim=1, descending=True, stable=True)[:, :hard]
            noise = noise.scatter(1, hardest, 1.0)  # never among the smallest
        return all_but_smallest(noise, self.visible_count(patches))

"""A-CLIP's policy: keep what the teacher attends to, in squares (arXiv:2212.08653, 2022).

Deviation: the teacher looks at the view itself, not at a larger crop that two views are cut from, and its attention is
whatever the method gives, the last block's here, where A-CLIP averages all blocks.
"""

from typing import ClassVar

import torch
from torch import Tensor

from mim.masking.grid import GridMasking, spread
from mim.randomness import RowGenerator


class AttentionKeepMasking(GridMasking):
    """Leaves visible the squares of highest mean score, such as a teacher's attention: the mirror of AttMask.

    Args:
        ratio: share of squares to hide, in [0, 1); exactly ``int(squares * (1 - ratio)) + 1`` of them stay visible, as
            in the reference. A-CLIP uses 0.5.
        cell: as for ``GridMasking``; 2 in A-CLIP.
    """

    guided: ClassVar[bool] = True

    def __init__(self, ratio: float = 0.5, cell: int | None = 2) -> None:
        super().__init__(ratio, cell)

    def visible_squares(self, squares: int) -> int:
        """``int(squares * (1 - ratio)) + 1``, or all."""
        return min(squares, int(squares * (1 - self.ratio)) + 1)

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True = hidden; see :meth:`Masking.draw`. Of equal squares the first in raster order stay."""
        assert scores is not None  # forward has looked
        rows, columns = self.squares(grid)
        cells = scores.view(-1, rows, grid[0] // rows, columns, grid[1] // columns).mean(dim=(2, 4)).flatten(1)
        kept = cells.argsort(dim=1, descending=True, stable=True)[:, : self.visible_squares(rows * columns)]
        hidden = torch.ones_like(cells, dtype=torch.bool).scatter(1, kept, False)
        return spread(hidden, grid, grid[0] // rows)

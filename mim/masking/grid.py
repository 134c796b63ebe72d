"""Random masking in squares of several patches, so that nothing visible is next to most of what is hidden.

SimMIM (arXiv:2111.09886) has squares of 32 px whatever the patch size, Pixio of 4 x 4 patches.
"""

import math

from torch import Tensor

from mim.masking.uniform import RandomMasking, all_but_smallest
from mim.randomness import RowGenerator

_PER_SIDE = 7  # squares of 32 px at 224 px
_FEWEST = 4  # with less there is nothing to choose


class GridMasking(RandomMasking):
    """Hides the same share of every image in squares of ``cell`` by ``cell`` patches, all choices being equally likely.

    Args:
        ratio: share of squares to hide, in [0, 1); exactly ``int(squares * (1 - ratio))`` of them stay visible.
        cell: patches per side of a square; both sides of the image must be a multiple of it. If null, about a seventh
            of the shorter side whatever the patch size: 32 px of 224, one patch of images of few patches.
    """

    def __init__(self, ratio: float = 0.75, cell: int | None = 2) -> None:
        super().__init__(ratio)
        if cell is not None and cell < 1:
            raise ValueError(f"cell {cell}: a square has one patch per side or more")
        self.cell = cell

    def fit(self, grid: tuple[int, int]) -> None:
        """Settles the size of squares that was left open; see :meth:`Masking.fit`."""
        if self.cell is None:
            self.cell = seventh(grid)
        if (squares := math.prod(side // self.cell for side in grid)) < _FEWEST:
            raise ValueError(
                f"{grid[0]} x {grid[1]} patches are {squares} squares of {self.cell} x {self.cell}, fewer than "
                f"{_FEWEST}; choose a smaller cell, smaller patches or larger images"
            )

    def visible_count(self, patches: int) -> int:
        """Patches of the squares that stay visible."""
        cell = self._settled()
        if patches % cell**2:
            raise ValueError(f"{patches} patches are no whole number of squares of {cell} x {cell}")
        return self.visible_squares(patches // cell**2) * cell**2

    def visible_squares(self, squares: int) -> int:
        """How many of ``squares`` stay visible."""
        return super().visible_count(squares)

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True = hidden; see :meth:`Masking.draw`."""
        rows, columns = self.squares(grid)
        noise = generator.rand(rows * columns)  # (B, squares)
        return spread(all_but_smallest(noise, self.visible_squares(rows * columns)), grid, self._settled())

    def squares(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Squares per side.

        Raises:
            ValueError: if a side of the image is not a multiple of ``cell``.
        """
        cell = self._settled()
        rows, columns = (side // cell for side in grid)
        if (rows * cell, columns * cell) != grid:
            raise ValueError(f"{grid[0]} x {grid[1]} patches do not divide into squares of {cell} x {cell}")
        return rows, columns

    def _settled(self) -> int:
        if self.cell is None:
            raise ValueError("the size of squares was left open, and fit(grid) has not been called")
        return self.cell


def seventh(grid: tuple[int, int]) -> int:
    """Patches per side of squares that both sides divide into, as near to a seventh of the shorter side as can be."""
    common, wanted = math.gcd(*grid), min(grid) / _PER_SIDE
    divisors = (number for number in range(1, common + 1) if common % number == 0)
    return min(divisors, key=lambda number: abs(math.log(number / wanted)))


def spread(squares: Tensor, grid: tuple[int, int], cell: int) -> Tensor:
    """Values ``(B, S)`` of squares of ``cell`` by ``cell`` patches, in raster order, as those of patches ``(B, N)``."""
    rows, columns = (side // cell for side in grid)
    return squares.view(-1, rows, 1, columns, 1).expand(-1, -1, cell, -1, cell).reshape(len(squares), -1)

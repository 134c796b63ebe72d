"""Random masking in squares of several patches, so that nothing visible is next to most of what is hidden (Pixio)."""

from torch import Tensor

from mim.masking.uniform import RandomMasking, all_but_smallest
from mim.randomness import RowGenerator


class GridMasking(RandomMasking):
    """Hides the same share of every image in squares of ``cell`` by ``cell`` patches, all choices being equally likely.

    Args:
        ratio: share of squares to hide, in [0, 1); exactly ``int(squares * (1 - ratio))`` of them stay visible.
        cell: patches per side of a square; both sides of the image must be a multiple of it.
    """

    def __init__(self, ratio: float = 0.75, cell: int = 2) -> None:
        super().__init__(ratio)
        if cell < 1:
            raise ValueError(f"cell {cell}: a square has one patch per side or more")
        self.cell = cell

    def visible_count(self, patches: int) -> int:
        """Patches of the squares that stay visible."""
        area = self.cell**2
        if patches % area:
            raise ValueError(f"{patches} patches are no whole number of squares of {self.cell} x {self.cell}")
        return super().visible_count(patches // area) * area

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True = hidden; see :meth:`Masking.draw`.

        Raises:
            ValueError: if a side of the image is not a multiple of ``cell``.
        """
        rows, columns = (side // self.cell for side in grid)
        if (rows * self.cell, columns * self.cell) != grid:
            raise ValueError(f"{grid[0]} x {grid[1]} patches do not divide into squares of {self.cell} x {self.cell}")
        noise = generator.rand(rows * columns)  # (B, squares)
        hidden = all_but_smallest(noise, self.visible_count(grid[0] * grid[1]) // self.cell**2)
        squares = hidden.view(-1, rows, 1, columns, 1).expand(-1, -1, self.cell, -1, self.cell)
        return squares.reshape(len(noise), -1)

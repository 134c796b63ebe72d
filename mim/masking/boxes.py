"""Masks from a list of boxes, such as the words of a form or the fields of a label (StrucTexTv2, arXiv:2303.00289)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mim.distributed.devices import send
from mim.masking.uniform import RandomMasking
from mim.randomness import RowGenerator

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of the width and the height."""


class BoxMasking(RandomMasking):
    """Hides whole boxes, in an order drawn for every image, until the same share of each is hidden.

    The last box may be hidden in part, in raster order; if all boxes are too small together, other patches follow by
    chance. Boxes are the same for all images: for pages of one layout that are neither cropped nor flipped
    (``SingleView`` with ``scale: [1.0, 1.0]`` and ``flip: 0``).

    Args:
        boxes: left, top, right and bottom of each as shares of the image's sides; a patch belongs to every box that it
            shares any area with.
        ratio: share of patches to hide, in [0, 1). Exactly ``int(N * (1 - ratio))`` stay visible.
    """

    def __init__(self, boxes: Sequence[Box], ratio: float = 0.3) -> None:
        super().__init__(ratio)
        if not boxes:
            raise ValueError("there are no boxes to hide")
        for left, top, right, bottom in boxes:
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                box = f"[{left:g}, {top:g}, {right:g}, {bottom:g}]"
                raise ValueError(f"box {box} is not left, top, right, bottom with shares of the image from 0 to 1")
        self._boxes = [tuple(box) for box in boxes]

    def extra_repr(self) -> str:
        """Ratio and number of boxes."""
        return f"{len(self._boxes)} boxes, {super().extra_repr()}"

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True = hidden; see :meth:`Masking.draw`."""
        patches = grid[0] * grid[1]
        covered = send(self._covered(grid), generator.device)  # (boxes, N)
        turn = generator.rand(len(covered))[..., None].where(covered, 2.0).amin(dim=1)  # (B, N), of a patch's first box
        turn = turn.where(turn < 2, 1 + generator.rand(patches))
        # The first in turn are hidden; of one box the first in raster order, which a stable sort keeps.
        order = turn.argsort(dim=1, stable=True)[:, : patches - self.visible_count(patches)]
        hidden: Tensor = torch.zeros_like(turn, dtype=torch.bool).scatter(1, order, True)
        return hidden

    def _covered(self, grid: tuple[int, int]) -> Tensor:
        """``(boxes, N)`` bool: which patches share area with which box."""
        left, top, right, bottom = torch.tensor(self._boxes, dtype=torch.float64).T[..., None]
        row, column = (torch.arange(side + 1, dtype=torch.float64) / side for side in grid)  # edges of patches
        rows = (row[:-1] < bottom) & (row[1:] > top)  # (boxes, h)
        columns = (column[:-1] < right) & (column[1:] > left)
        covered: Tensor = (rows[:, :, None] & columns[:, None, :]).flatten(1)
        return covered

"""One rectangle per image, hidden or left visible, wrapped round the edges: the masks of CAPI (arXiv:2502.08769).

With ``inverse`` and ``rolled`` it is the inverse block of CAPI and Franca's CyclicMask (arXiv:2507.14137).
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from mim.masking.base import Masking
from mim.randomness import RowGenerator

_ASPECTS = (0.5, 2.0)  # height over width, before the grid sets its own limits


class RectangleMasking(Masking):
    """Leaves one rectangle of every image visible, or hides one; the same number of patches in every image.

    A rectangle has as many patches as are asked for: the first ones in raster order of the smallest rectangle of a
    random aspect that holds them.

    Args:
        ratio: share of patches to hide, in [0, 1); CAPI uses 0.65. Exactly ``int(N * ratio)`` are hidden.
        inverse: the rectangle is what stays visible; what is hidden if not.
        rolled: the mask is shifted by random numbers of rows and columns, and what leaves the image on one side comes
            back on the other, so that every place is hidden equally often.
    """

    ratio_settings: ClassVar[tuple[str, ...]] = ("ratio",)

    def __init__(self, ratio: float = 0.65, inverse: bool = True, rolled: bool = True) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio {ratio} is outside [0, 1): some patches must stay visible")
        self.ratio, self.inverse, self.rolled = ratio, inverse, rolled

    def visible_count(self, patches: int) -> int:
        """All but ``int(patches * ratio)``."""
        return patches - int(patches * self.ratio)

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True = hidden; see :meth:`Masking.draw`."""
        patches = math.prod(grid)
        visible = self.visible_count(patches)
        block = rectangles(generator.rand(3), grid, visible if self.inverse else patches - visible)  # (B, h, w)
        mask = ~block if self.inverse else block
        if self.rolled:
            mask = _rolled(mask, generator.rand(2))
        return mask.flatten(1)


def rectangles(numbers: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """Random rectangles cut to exactly ``count`` patches: ``(B, h, w)`` bool.

    Args:
        numbers: ``(B, 3)``, uniform on [0, 1): aspect, row and column.
        grid: ``(h, w)`` patches per side.
        count: patches, from 0 to ``h * w``.
    """
    rows, columns = grid
    limits = (count / columns**2, rows**2 / max(1, count))  # beyond these a side would be longer than the grid's
    low, high = (math.log(min(max(aspect, limits[0]), limits[1])) if count else 0.0 for aspect in _ASPECTS)
    aspect = (low + (high - low) * numbers[:, 0]).exp()
    # Roots are rounded: sides stay within the grid, and hold count patches.
    height = (count * aspect).sqrt().ceil().long().clamp(-(-count // columns), rows)
    width = torch.maximum((count / aspect).sqrt().ceil().long(), (count - 1) // height.clamp(min=1) + 1)
    width = width.clamp(max=columns)
    top = (numbers[:, 1] * (rows - height + 1)).long()[:, None, None]
    left = (numbers[:, 2] * (columns - width + 1)).long()[:, None, None]
    height, width = height[:, None, None], width[:, None, None]
    row = torch.arange(rows, device=numbers.device)[:, None] - top  # (B, h, 1), counted from the rectangle's own
    column = torch.arange(columns, device=numbers.device) - left  # (B, 1, w)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return inside & (row * width + column < count)


def _rolled(mask: Tensor, numbers: Tensor) -> Tensor:
    """``(B, h, w)``, each shifted by its own share ``(B, 2)`` of the height and the width, round the edges."""
    rows, columns = mask.shape[1:]
    down, right = (numbers[:, 0] * rows).long(), (numbers[:, 1] * columns).long()
    row = (torch.arange(rows, device=mask.device) - down[:, None]) % rows  # (B, h)
    column = (torch.arange(columns, device=mask.device) - right[:, None]) % columns  # (B, w)
    batch = torch.arange(len(mask), device=mask.device)[:, None, None]
    return mask[batch, row[:, :, None], column[:, None, :]]

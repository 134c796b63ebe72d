"""Block-wise masking: rectangles, as in BEiT (arXiv:2106.08254) and, with a random ratio, iBOT (arXiv:2111.07832)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.masking.base import Masking, check_ratios
from mim.randomness import RowGenerator

_ATTEMPTS = 10  # tries to place one more rectangle before an image counts as full
_ROUNDS = 32  # rectangles per image; placing more is possible, but rarer than one image in a million
_LOG_ASPECT = math.log(1 / 0.3)  # rectangles are at most 1 / 0.3 times as high as wide, or as wide as high


class BlockMasking(Masking):
    """Covers images with rectangles up to a ratio of its own for every image; the default is iBOT's.

    The number of hidden patches may stay below ratio times patches, it never exceeds it.

    Args:
        low: smallest ratio.
        high: largest ratio; each image draws its own between the two.
        unmasked_share: share of the images in which nothing is hidden.
    """

    def __init__(self, low: float = 0.1, high: float = 0.5, unmasked_share: float = 0.5) -> None:
        super().__init__()
        check_ratios(low, high, unmasked_share)
        self.low, self.high, self.unmasked_share = low, high, unmasked_share

    def most_hidden(self, patches: int) -> int:
        """``int(patches * high)``."""
        return int(patches * self.high)

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True = hidden; see :meth:`Masking.draw`."""
        gate, share = generator.rand(2).unbind(1)
        ratio = (self.low + (self.high - self.low) * share) * (gate >= self.unmasked_share)
        room = ratio * (grid[0] * grid[1])  # (B,) patches that may still be hidden
        draws = generator.rand(_ROUNDS, 4, _ATTEMPTS)
        mask = torch.zeros(len(generator), *grid, dtype=torch.bool, device=room.device)
        active = torch.ones_like(gate, dtype=torch.bool)
        for numbers in draws.unbind(1):
            block, added = _first_that_fits(mask, torch.where(active, room, 0), numbers)
            mask, room, active = mask | block, room - added, added > 0
            if room.device.type == "cpu" and not active.any():  # asking a GPU would make it wait
                break
        return mask.flatten(1)


def _first_that_fits(mask: Tensor, room: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The first of several random rectangles that hides something new and not more than there is room for.

    Args:
        mask: ``(B, h, w)`` bool, what is hidden already.
        room: ``(B,)`` patches that may be added.
        numbers: ``(B, 4, A)`` uniform numbers: area, aspect, row and column of every attempt.

    Returns:
        The rectangle, ``(B, h, w)`` bool, and the number of patches it adds, ``(B,)``; both zero if none fits.
    """
    _, rows, columns = mask.shape
    smallest = (min(rows, columns) // 3) ** 2
    area = smallest + (room[:, None] - smallest) * numbers[:, 0]  # (B, A)
    aspect = ((2 * numbers[:, 1] - 1) * _LOG_ASPECT).exp()
    height, width = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    inside = (height < rows) & (width < columns)  # no rectangle spans a whole side
    height, width = height.clamp(max=rows - 1), width.clamp(max=columns - 1)
    top = (numbers[:, 2] * (rows - height + 1)).long()
    left = (numbers[:, 3] * (columns - width + 1)).long()
    corners = F.pad(mask.long().cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)  # hidden above and left of every corner

    def hidden(row: Tensor, column: Tensor) -> Tensor:
        return corners.gather(1, row * (columns + 1) + column)

    bottom, right = top + height, left + width
    added = height * width - hidden(bottom, right) + hidden(top, right) + hidden(bottom, left) - hidden(top, left)
    fits = inside & (added > 0) & (added <= room[:, None])
    first = fits.byte().argmax(dim=1, keepdim=True)
    top, bottom, left, right = (edge.gather(1, first)[..., None] for edge in (top, bottom, left, right))  # (B, 1, 1)
    row = torch.arange(rows, device=mask.device)[:, None]
    column = torch.arange(columns, device=mask.device)
    found = fits.any(dim=1)
    block = (top <= row) & (row < bottom) & (left <= column) & (column < right) & found[:, None, None]
    return block, torch.where(found, added.gather(1, first)[:, 0], 0)

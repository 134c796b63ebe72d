"""One large context block and several target blocks cut out of it: the masks of I-JEPA (arXiv:2301.08243, 2023).

Deviations:
    A block may lie at the last row and column, where the released sampler never puts one, and a context that must
    shrink to the common size loses patches at random, not its lowest rows; ``released`` brings both back.
    The context is a block of the image's shape, which in square images is a square.
    Where targets leave too little, all blocks are placed again; the released sampler would let them overlap.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mim.masking.base import Masking
from mim.masking.uniform import all_but_smallest
from mim.randomness import RowGenerator

_ATTEMPTS = 8  # to place all blocks so that enough context is left
_STEPS = 33  # of each number on which the size of a block depends, when a grid is looked at

Range = tuple[float, float]
"""Smallest and largest."""


@dataclass(frozen=True)
class Blocks:
    """What the images of a batch show and ask for.

    Args:
        hidden: ``(B, N)`` bool, True for patches outside the context; equally many in every row.
        visible: patches of a context, ``K``.
        targets: ``(B, T, M)`` int64, patches of each target block in raster order.
    """

    hidden: Tensor
    visible: int
    targets: Tensor


class MultiBlockMasking(Masking):
    """One context block minus several target blocks; sizes are those of the step, places those of the image.

    A mask hides all but the context. :meth:`blocks` gives the targets, too, and contexts of equal size.

    Args:
        targets: blocks to predict; they may overlap each other, never the context.
        target_scale: area of a target block as a share of the image, smallest and largest.
        target_aspect: its height over its width, smallest and largest.
        context_scale: area of the context block before targets are cut out.
        least_context: share of the patches that must be left of it, or all blocks are placed again.
        released: the sampler of the released code, for comparison: no block at the last row and column, area and aspect
            by the same random number, and contexts that keep their first patches.
    """

    def __init__(
        self,
        targets: int = 4,
        target_scale: Range = (0.15, 0.2),
        target_aspect: Range = (0.75, 1.5),
        context_scale: Range = (0.85, 1.0),
        least_context: float = 0.05,
        released: bool = False,
    ) -> None:
        super().__init__()
        for name, (low, high), most in (
            ("target_scale", target_scale, 1),
            ("target_aspect", target_aspect, math.inf),
            ("context_scale", context_scale, 1),
        ):
            if not 0 < low <= high <= most:
                raise ValueError(f"{name} [{low}, {high}] is no range from above 0 to {most}")
        if targets < 1 or not 0 < least_context <= 1:
            raise ValueError(f"targets {targets} is no number of blocks, or least_context {least_context} no share")
        self.targets, self.least_context, self.released = targets, least_context, released
        self.target_scale, self.target_aspect = target_scale, target_aspect
        self.context_scale = context_scale

    def fit(self, grid: tuple[int, int]) -> None:
        """Refuses a grid on which a target may cover the context; see :meth:`Masking.fit`."""
        steps = [step / (_STEPS - 1) for step in range(_STEPS)]
        shares = [(a, b) for a in steps for b in steps if a == b or not self.released]
        target = max(math.prod(self.target_size(grid, *pair)) for pair in shares)
        context = min(math.prod(self.context_size(grid, share)) for share in steps)
        if target >= context:
            raise ValueError(
                f"{grid[0]} x {grid[1]} patches: a target of up to {target} patches may cover a context of {context}; "
                "choose smaller patches, larger images or another target_scale"
            )

    def target_size(self, grid: tuple[int, int], scale: float, aspect: float) -> tuple[int, int]:
        """Height and width of target blocks, by two numbers from 0 to 1 that say where in their ranges they are."""
        area = int(math.prod(grid) * _between(self.target_scale, scale))
        shape = _between(self.target_aspect, aspect)
        return self._within(grid, math.sqrt(area * shape), math.sqrt(area / shape))

    def context_size(self, grid: tuple[int, int], scale: float) -> tuple[int, int]:
        """Height and width of the context block, by a number from 0 to 1."""
        area, (rows, columns) = int(math.prod(grid) * _between(self.context_scale, scale)), grid
        return self._within(grid, math.sqrt(area * rows / columns), math.sqrt(area * columns / rows))

    def _within(self, grid: tuple[int, int], *sides: float) -> tuple[int, int]:
        """Sides in whole patches; those of the released sampler stay below the grid's."""
        room = [side - self.released for side in grid]
        height, width = (max(1, min(round(side), most)) for side, most in zip(sides, room, strict=True))
        return height, width

    def draw(self, generator: RowGenerator, grid: tuple[int, int], scores: Tensor | None, progress: float) -> Tensor:
        """``(B, N)`` bool, True outside the context, before contexts are cut to one size; see :meth:`Masking.draw`."""
        return self._placed(generator, grid)[0]

    def blocks(self, generator: RowGenerator, grid: tuple[int, int], rows: slice = slice(None)) -> Blocks:
        """Contexts of the common size that the smallest of them has, and target blocks.

        Args:
            generator: random numbers of **all** rows of a global batch, on the CPU; a part would find another size.
            grid: ``(h, w)`` patches per side.
            rows: those wanted.
        """
        outside, corner, size = self._placed(generator, grid)
        patches, hidden = math.prod(grid), outside[rows]
        visible = patches - int(outside.sum(dim=1).max())
        own = RowGenerator(generator.keys[rows]).views(1)
        order = torch.arange(patches) / patches if self.released else own.rand(patches)
        return Blocks(all_but_smallest(order.where(~hidden, 2.0), visible), visible, _inside(corner[rows], grid, size))

    def _placed(self, generator: RowGenerator, grid: tuple[int, int]) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Masks ``(B, N)`` of what is outside the contexts; upper left corners ``(B, T, 2)`` and size of targets."""
        scale, aspect, area = generator.common(3)
        size, context = self.target_size(grid, scale, scale if self.released else aspect), self.context_size(grid, area)
        enough = max(1, math.ceil(self.least_context * math.prod(grid)))
        corner = self._corners(generator.rand(self.targets + 1, 2), grid, size, context)
        outside = _outside(corner, grid, size, context)
        for attempt in range(1, _ATTEMPTS):
            short = (~outside).sum(dim=1) < enough  # (B,)
            if short.device.type == "cpu" and not short.any():  # asking a GPU would make it wait
                break
            numbers = generator.rand(self.targets + 1, 2)
            if attempt == _ATTEMPTS - 1:  # all targets in one place leave the most
                numbers[:, 1:-1] = numbers[:, :1]
            corner = self._corners(numbers, grid, size, context).where(short[:, None, None], corner)
            outside = _outside(corner, grid, size, context)
        return outside, corner[:, :-1], size

    def _corners(
        self, numbers: Tensor, grid: tuple[int, int], size: tuple[int, int], context: tuple[int, int]
    ) -> Tensor:
        """Upper left corners ``(B, T + 1, 2)`` of the target blocks and, last, the context, by uniform numbers."""
        sizes = torch.tensor([*([size] * self.targets), context], device=numbers.device)  # (T + 1, 2)
        places = torch.tensor(grid, device=numbers.device) - sizes + (not self.released)
        return (numbers * places.clamp(min=1)).long()


def _outside(corner: Tensor, grid: tuple[int, int], size: tuple[int, int], context: tuple[int, int]) -> Tensor:
    """``(B, N)`` bool, True in a target block or outside the context block, for corners ``(B, T + 1, 2)``."""
    outside = ~_block(corner[:, -1], grid, context)
    for own in corner[:, :-1].unbind(1):
        outside |= _block(own, grid, size)
    return outside.flatten(1)


def _block(corner: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """``(B, h, w)`` bool, True in the block of this size whose upper left corner is ``(B, 2)``."""
    row, column = (
        (places := torch.arange(side, device=corner.device) - start[:, None]).ge(0) & places.lt(long)
        for side, start, long in zip(grid, corner.unbind(1), size, strict=True)
    )  # (B, h), (B, w)
    return row[:, :, None] & column[:, None, :]


def _inside(corner: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Patches ``(B, T, M)`` of blocks whose upper left corners are ``(B, T, 2)``."""
    rows, columns = (torch.arange(side, device=corner.device) for side in size)
    row, column = corner[..., 0, None] + rows, corner[..., 1, None] + columns
    return (row[..., :, None] * grid[1] + column[..., None, :]).flatten(2)


def _between(limits: Range, share: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * share

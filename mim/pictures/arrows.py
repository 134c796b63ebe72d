"""Arrows over images: where patches are believed to be."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

_SIDE = 192  # pixels of the shorter side at least, so that arrows of neighbouring patches can be told apart


def arrows(images: Tensor, grid: tuple[int, int], places: Tensor) -> Tensor:
    """Images with an arrow from the middle of each patch to that of the place it is given; a dot where they are one.

    Args:
        images: ``(B, C, H, W)``, normalised; small ones grow by a whole factor.
        grid: ``(h, w)`` patches per side.
        places: ``(B, N, 2)`` row and column of a patch, for each patch in raster order.

    Returns:
        ``(B, C, H', W')`` in the same normalised space: arrows are as bright as the brightest pixel of the batch, with
        a border as dark as the darkest.
    """
    factor = math.ceil(_SIDE / min(images.shape[2:]))
    shown = F.interpolate(images, scale_factor=factor, mode="nearest") if factor > 1 else images
    lines = torch.stack([_lines(shown.shape[2:], grid, own) for own in places.tolist()]).to(images.device)[:, :, None]
    low, high = images.amin(dim=(0, 2, 3), keepdim=True), images.amax(dim=(0, 2, 3), keepdim=True)
    return torch.where(lines[:, 1], high, torch.where(lines[:, 0], low, shown))


def _lines(size: torch.Size, grid: tuple[int, int], places: list[list[float]]) -> Tensor:
    """Border and inside of all arrows of an image, ``(2, H, W)`` bool."""
    height, width = size
    side = height / grid[0], width / grid[1]
    ends = [
        [((column + 0.5) * side[1], (row + 0.5) * side[0]) for row, column in pair]
        for pair in zip(((n // grid[1], n % grid[1]) for n in range(len(places))), places, strict=True)
    ]
    layers = []
    for thick in (3, 1):
        canvas = Image.new("1", (width, height))
        pen = ImageDraw.Draw(canvas)
        for start, end in ends:
            _arrow(pen, start, end, thick, min(side) / 4)
        layers.append(torch.from_numpy(np.array(canvas)))
    return torch.stack(layers)


def _arrow(
    pen: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], thick: int, head: float
) -> None:
    across, down = end[0] - start[0], end[1] - start[1]
    if not across and not down:
        radius = thick
        pen.ellipse((end[0] - radius, end[1] - radius, end[0] + radius, end[1] + radius), fill=1)
        return
    pen.line((*start, *end), fill=1, width=thick)
    angle = math.atan2(down, across)
    for turn in (-2.6, 2.6):  # radians from the line to either side of its head
        pen.line(
            (*end, end[0] + head * math.cos(angle + turn), end[1] + head * math.sin(angle + turn)), fill=1, width=thick
        )

"""Segmentations as pictures: image, truth and answer side by side, with a legend of the classes in them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, HEADER = 6, 24  # pixels between tiles, and above them for the titles
INK = (122, 122, 122)  # legible on white and on black; the background is transparent
SHOWN = 320  # longest side of a tile in pixels
OPACITY = 0.65  # of a class's colour over the grey image
LINE = 20  # height of a line of the legend


def palette(classes: int) -> NDArray[np.uint8]:
    """``(classes, 3)`` colours: twenty that are easy to tell apart, beyond them evenly spread hues."""
    colours = colormaps["tab20"](range(20)) if classes <= 20 else colormaps["hsv"](np.linspace(0, 0.95, classes))
    # tab20 holds pairs of dark and light: first all dark ones, then all light ones.
    colours = np.concatenate([colours[::2], colours[1::2]]) if classes <= 20 else colours
    return (colours[:classes, :3] * 255).astype(np.uint8)


def save_overlay(path: Path, image: Tensor, truth: Tensor, answer: Tensor, names: Sequence[str]) -> None:
    """Writes image, truth and answer as a PNG.

    Args:
        path: file to write.
        image: ``(C, H, W)``; the contrast of what is not 8 bit is stretched.
        truth: ``(H', W')`` classes, negative where nothing is scored; these pixels are black in both pictures.
        answer: ``(H', W')`` classes.
        names: of the classes.
    """
    height, width = truth.shape
    scale = SHOWN / max(height, width)
    size = round(width * scale), round(height * scale)
    colours = palette(len(names))
    photo = Image.fromarray(_rgb(image)).resize(size, Image.Resampling.BICUBIC)
    shown = [photo, *(_tinted(photo, _known(part, truth), colours, size) for part in (truth, answer))]
    present = [(int(value), names[value]) for value in torch.unique(torch.cat([truth, answer])).tolist() if value >= 0]
    canvas = Image.new("RGBA", (3 * size[0] + 4 * GAP, HEADER + size[1] + 2 * GAP), (*INK, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for column, (title, tile) in enumerate(zip(("image", "truth", "prediction"), shown, strict=True)):
        left = GAP + column * (size[0] + GAP)
        draw.text((left + size[0] / 2, HEADER / 2), title, INK, font, "mm")
        canvas.paste(tile, (left, HEADER))
    legend = _legend(present, colours, canvas.width, font)
    picture = Image.new("RGBA", (canvas.width, canvas.height + legend.height), (*INK, 0))
    picture.paste(canvas, (0, 0))
    picture.paste(legend, (0, canvas.height))
    picture.save(path)


def _rgb(image: Tensor) -> NDArray[np.uint8]:
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    if shown.dtype != torch.uint8:
        numbers = shown.float().flatten(1)
        low, high = (
            numbers[:, :: max(1, numbers.shape[1] >> 20)].nanquantile(q, dim=1, keepdim=True) for q in (0.01, 0.99)
        )
        share = ((numbers - low) / (high - low).clamp(min=1e-12)).nan_to_num(0).clamp(0, 1)
        shown = (255 * share).round().byte().view_as(shown)
    return shown.permute(1, 2, 0).cpu().numpy()


def _known(classes: Tensor, truth: Tensor) -> NDArray[np.int64]:
    return torch.where(truth < 0, -1, classes.long()).cpu().numpy()


def _tinted(
    photo: Image.Image, classes: NDArray[np.int64], colours: NDArray[np.uint8], size: tuple[int, int]
) -> Image.Image:
    tint = np.where(classes[..., None] < 0, 0, colours[classes.clip(0)]).astype(np.uint8)
    flat = Image.fromarray(tint).resize(size, Image.Resampling.NEAREST)
    return Image.blend(photo.convert("L").convert("RGB"), flat, OPACITY)


def _legend(
    entries: Sequence[tuple[int, str]],
    colours: NDArray[np.uint8],
    width: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> Image.Image:
    """Squares and names, as many in a line as fit."""
    places, left, line = [], GAP, 0
    for value, name in entries:
        needed = round(font.getbbox(name)[2]) + 2 * LINE
        if left + needed > width and left > GAP:
            left, line = GAP, line + 1
        places.append((left, line * LINE, value, name))
        left += needed
    canvas = Image.new("RGBA", (width, (line + 1) * LINE), (*INK, 0))
    draw = ImageDraw.Draw(canvas)
    for x, y, value, name in places:
        draw.rectangle((x, y + 3, x + 12, y + 15), fill=tuple(colours[value].tolist()))
        draw.text((x + 18, y + LINE / 2), name, INK, font, "lm")
    return canvas

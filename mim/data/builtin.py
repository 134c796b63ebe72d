"""The photos that come with the package: windows to pretrain and classify on, mosaics to segment.

Nothing is downloaded; ``photos/README.md`` holds source and licence of every file. Train windows come from the left
60 % of a photo, test windows from the right 35 %: no pixel is in both, and the gap is wider than a JPEG block.

A photo has few colours, so mean colour alone would name it: k-NN finds 65 % on mean colour, 76 % on the features of an
untrained ViT. Every window is therefore exposed and tinted at random by one gamma curve per channel, which hides the
colours and keeps the structure: both fall to about 35 %. These are sanity checks for a method, not a benchmark.
"""

from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mim.data.pixels import EIGHT_BIT, Pixels
from mim.data.shapes import ShapeSource
from mim.errors import UserError
from mim.randomness import keyed_generator

Photo = Literal[
    "astronaut",
    "brick",
    "camera",
    "cat",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble",
    "ihc",
    "retina",
    "rocket",
    "text",
]
Split = Literal["train", "test"]

_TEXTURES: tuple[Photo, ...] = ("brick", "grass", "gravel", "hubble", "ihc", "retina")
_WINDOW = (80.0, 130.0)  # side in photo pixels; the narrowest test region is 134 wide


class PhotoSource:
    """Square windows of the built-in photos at random places, scales and exposures; the label is the photo.

    Item ``index`` is a function of (split, index) alone. Classes are balanced.

    Args:
        split: ``train`` takes the left 60 % of every photo, ``test`` the right 35 %.
        count: number of windows; by default 2,048 for training and 512 for testing.
        size: side of a window in pixels.
    """

    name = "photos"

    def __init__(self, split: Split, count: int | None = None, size: int = 96) -> None:
        self.split, self.size = split, size
        self.count = {"train": 2048, "test": 512}[split] if count is None else count
        self.classes: list[str] = list(get_args(Photo))
        self.labels: list[int] | None = [index % len(self.classes) for index in range(self.count)]

    def __len__(self) -> int:
        """Number of images."""
        return self.count

    def describe(self, index: int) -> str:
        """Where image ``index`` comes from, for messages."""
        return f"photos:{self.split}/{index} (a window of {self._photo(index)}.jpg)"

    def read(self, index: int) -> Tensor:
        """``(3, size, size)`` uint8."""
        generator = keyed_generator(self.name, self.split, index)
        return _window(self._photo(index), self.split, self.size, generator)

    def _photo(self, index: int) -> Photo:
        photos: tuple[Photo, ...] = get_args(Photo)
        return photos[index % len(photos)]


class MosaicSource:
    """Voronoi mosaics of the texture photos with per-pixel classes: **real pixels in a synthetic layout**.

    Three to six cells, each a window of one texture. Exposure and tint differ from cell to cell, so only texture tells
    the classes apart. Borders are straight lines: scores say little about real outlines.

    Args:
        split: which part of the photos, as in ``PhotoSource``.
        count: number of mosaics; by default 512 for training and 128 for testing.
        size: side of a mosaic in pixels.
    """

    name = "mosaics"
    labels: list[int] | None = None

    def __init__(self, split: Split, count: int | None = None, size: int = 96) -> None:
        self.split, self.size = split, size
        self.count = {"train": 512, "test": 128}[split] if count is None else count
        self.classes: list[str] = []
        self.mask_classes: list[str] = list(_TEXTURES)

    def __len__(self) -> int:
        """Number of images."""
        return self.count

    def describe(self, index: int) -> str:
        """Which mosaic image ``index`` is, for messages."""
        return f"mosaics:{self.split}/{index}"

    def read(self, index: int) -> Tensor:
        """``(3, size, size)`` uint8."""
        return self.read_pair(index)[0]

    def read_mask(self, index: int) -> Tensor:
        """The mask of :meth:`read_pair` alone."""
        return self.read_pair(index)[1]

    def read_pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Image ``(3, size, size)`` uint8 and its mask ``(size, size)`` uint8, which indexes ``mask_classes``."""
        generator = keyed_generator(self.name, self.split, index)
        count = int(torch.randint(3, 7, (), generator=generator))
        textures = torch.randperm(len(_TEXTURES), generator=generator)[:count]
        sites = torch.rand(count, 2, generator=generator) * self.size
        pixels = torch.cartesian_prod(*[torch.arange(self.size) + 0.5] * 2)  # (size * size, 2)
        cells = torch.cdist(pixels, sites).argmin(1).view(self.size, self.size)
        windows = torch.stack([_window(_TEXTURES[i], self.split, self.size, generator) for i in textures.tolist()])
        image = windows.gather(0, cells.expand(1, 3, -1, -1))[0]
        return image, textures[cells].to(torch.uint8)


def open_built_in(
    data: str, channels: int, pixels: Pixels, label_column: str | None = None
) -> tuple[PhotoSource, PhotoSource] | tuple[ShapeSource, ShapeSource]:
    """The images that come with the package: those to learn from, and those set apart.

    Args:
        data: ``builtin`` or ``shapes``.
        channels: of the model.
        pixels: that the model takes, as far as that is known.
        label_column: what else was to hold the labels.

    Raises:
        UserError: for a model that takes other images, or labels from elsewhere.
    """
    if label_column is not None:
        raise UserError(f"--label_column {label_column}: {data} has labels of its own", hint="leave --label_column out")
    check_colour(data, channels, pixels)
    if data == "builtin":
        return PhotoSource("train"), PhotoSource("test")
    return ShapeSource("train"), ShapeSource("val")


def check_colour(data: str, channels: int, pixels: Pixels) -> None:
    """Refuses the images that come with the package, 8 bit in three channels, for a model that takes others.

    Args:
        data: ``builtin`` or ``shapes``.
        channels: of the model.
        pixels: that the model takes, as far as that is known.
    """
    if channels != 3:
        kind = f"{channels} channel{'s' * (channels > 1)}"
        raise UserError(
            f"--data {data}: these images are RGB, the model takes {kind}",
            hint=f"--data FOLDER   of images with {kind}",
        )
    if not pixels.eight_bit and (pixels.type != "any" or (pixels.low, pixels.high) != (EIGHT_BIT.low, EIGHT_BIT.high)):
        low, high = min(pixels.low), max(pixels.high)
        raise UserError(
            f"--data {data}: these images are 8 bit, the model takes numbers from {low:g} to {high:g}",
            why="on that scale they would be almost black or white",
            hint="--data FOLDER   of images like those that it was trained on",
        )


def _window(photo: Photo, split: Split, size: int, generator: torch.Generator) -> Tensor:
    """``(3, size, size)`` uint8: a square of the photo at a random place, scale, exposure and white balance."""
    region = _region(photo, split)
    place = torch.rand(3, generator=generator).tolist()
    side = _WINDOW[0] + place[0] * (_WINDOW[1] - _WINDOW[0])
    left, top = place[1] * (region.width - side), place[2] * (region.height - side)
    window = region.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))

    exposure, *tint = (torch.rand(4, generator=generator) * 2 - 1).tolist()
    gammas = torch.tensor([2 ** (1.2 * exposure + 0.4 * channel) for channel in tint])
    curves = torch.linspace(0, 1, 256) ** gammas[:, None]  # (3, 256)
    window = window.point(curves.mul(255).round().int().flatten().tolist())
    return torch.from_numpy(np.array(window)).permute(2, 0, 1).contiguous()


@cache
def _region(photo: Photo, split: Split) -> Image.Image:
    """The part of a photo that a split may see, decoded once per process.

    Cut before anything is resized: a filter at the edge of a window then cannot reach pixels of the other split.
    """
    with Image.open(Path(__file__).parent / "photos" / f"{photo}.jpg") as file:
        image = file.convert("RGB")
    width, height = image.size
    return image.crop((0, 0, int(0.6 * width), height) if split == "train" else (int(0.65 * width), 0, width, height))

"""Images with a class number for every pixel, and what may be wrong with their masks.

Where they lie is told by :mod:`mim.data.mask_pairs`, what the numbers mean by :mod:`mim.data.mask_classes`; ``builtin``
(mosaics of the photos' textures) and ``shapes`` (generated) need no files. Where the classes file gives each class a
colour, masks are pictures in these colours.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from mim.data.builtin import MosaicSource, check_colour
from mim.data.images import ImageError, read_colours, read_image, read_numbers
from mim.data.loading import reading
from mim.data.mask_classes import Colour, read_classes
from mim.data.mask_pairs import Pair, find_pairs
from mim.data.pictures import FORMATS
from mim.data.pixels import EIGHT_BIT, Pixels
from mim.data.places import BUILT_IN, check_folder_of_masks
from mim.data.shapes import ShapeSource
from mim.errors import UserError

_PACKED = np.array([1 << 16, 1 << 8, 1], dtype=np.int64)  # red, green and blue as one number
_QUARTER_TURNS = {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
"""EXIF orientations that swap the sides, with Pillow's name of what undoes them."""

CLASS_FILES = (
    *("mask_classes.txt", "classes.txt", "objectInfo150.txt", "class_dict.csv", "label_colors.txt"),
    "labelmap.txt",
)
"""Files in the data's folder that name the classes, if none is given."""


class PairSource(Protocol):
    """Images and their masks by index."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def describe(self, index: int) -> str:
        """What messages call the mask of image ``index``."""
        ...

    def read_pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Image ``(C, H, W)`` and mask ``(H, W)`` of whole numbers, as the file holds them."""
        ...

    def read_mask(self, index: int) -> Tensor:
        """The mask of :meth:`read_pair` alone."""
        ...


class PairedFiles:
    """Image files and mask files.

    Args:
        pairs: image and mask of each index.
        channels: of the images.
        colours: of the classes, if masks show them in colours.
        pixels: what the image files hold.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        channels: int = 3,
        colours: Sequence[Colour] | None = None,
        pixels: Pixels = EIGHT_BIT,
    ) -> None:
        self.pairs, self.channels, self.colours, self.pixels = pairs, channels, colours, pixels

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pairs)

    def describe(self, index: int) -> str:
        """Path of the mask."""
        return str(self.pairs[index][1])

    def read_pair(self, index: int) -> tuple[Tensor, Tensor]:
        """See :class:`PairSource`; raises a :class:`UserError` if either cannot be read or their sizes differ."""
        path = self.pairs[index][0]
        try:
            with reading(str(path)):
                image = read_image(path, self.channels, pixels=self.pixels)
        except ImageError as error:
            raise UserError(f"{error.path} cannot be used", why=error.reason, hint="remove the pair") from error
        mask = self.read_mask(index)
        if image.shape[1:] != mask.shape:
            raise self._other_size(index, image.shape[1:], mask.shape)
        return image, mask

    def read_mask(self, index: int) -> Tensor:
        """See :class:`PairSource`; raises a :class:`UserError` if it cannot be read."""
        path = self.pairs[index][1]
        try:
            with reading(str(path)):
                numbers = read_numbers(path) if self.colours is None else self._by_colour(path)
        except ImageError as error:
            hint = "class numbers as an 8-bit grey or palette PNG   or   --classes FILE   with lines  128 64 128 road"
            raise UserError(f"{error.path} cannot be used", why=error.reason, hint=hint) from error
        return torch.from_numpy(numbers.astype(np.int64))

    def turned(self, index: int) -> bool:
        """Whether the photo is stored turned in a way that its mask's size can neither confirm nor deny."""
        orientation = _orientation(self.pairs[index][0])
        if orientation in (2, 3, 4):
            return True
        return orientation in _QUARTER_TURNS and len(set(self.read_mask(index).shape)) == 1

    def _other_size(self, index: int, image: Sequence[int], mask: Sequence[int]) -> UserError:
        image_path, mask_path = self.pairs[index]
        (height, width), (rows, columns) = image, mask
        error = f"{mask_path} has {columns}x{rows} pixels, its image {width}x{height}"
        turn = _QUARTER_TURNS.get(_orientation(image_path)) if (rows, columns) == (width, height) else None
        if turn is not None:
            code = (
                f"from PIL import Image; m = Image.open({str(mask_path)!r}); "
                f"m.transpose(Image.Transpose.{turn}).save({str(mask_path)!r})"
            )
            return UserError(
                error,
                why="the photo is stored turned (EXIF), its mask is drawn on the unturned pixels",
                hint=f"turn the mask as the photo:  python -c {shlex.quote(code)}",
            )
        return UserError(
            error,
            why="every pixel of an image needs its class",
            hint=f"resize the mask without interpolation (nearest), or remove {image_path} and its mask",
        )

    def _by_colour(self, path: Path) -> NDArray[Any]:
        """Class numbers ``(H, W)`` of a mask in colours."""
        assert self.colours is not None
        known = np.array(self.colours) @ _PACKED
        order = known.argsort()
        pixels = read_colours(path) @ _PACKED
        nearest: NDArray[Any] = order[np.searchsorted(known, pixels, sorter=order).clip(max=len(known) - 1)]
        strange = known[nearest] != pixels
        if strange.any():
            row, column = np.argwhere(strange)[0]
            colour = " ".join(str(int(pixels[row, column]) >> shift & 255) for shift in (16, 8, 0))
            raise UserError(
                f"{path} has the colour {colour} at column {column}, row {row}: no class",
                why=f"{strange.sum():,} of its {strange.size:,} pixels have none of the {len(known)} colours named",
                hint=f"a line  {colour} name  in the classes file; --ignore leaves a class out by its number",
            )
        return nearest


class MaskedImages(NamedTuple):
    """Training and scored images, as :func:`open_masks` finds them."""

    train: PairSource
    test: PairSource
    names: dict[int, str]
    zero_is_other: bool
    split: str
    values: tuple[int, ...] | None = None
    ignore: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def open_masks(
    data: str,
    channels: int = 3,
    split: str | None = None,
    classes: Path | None = None,
    val_fraction: float = 0.2,
    pixels: Pixels = EIGHT_BIT,
) -> MaskedImages:
    """What ``--data`` names.

    Args:
        data: a folder in one of the layouts of :mod:`mim.data.mask_pairs`, or a built-in set.
        channels: of the images.
        split: part that is scored; the first held-out part of the layout if not given.
        classes: file that names the classes, see :func:`read_classes`.
        val_fraction: share that is held out where the data sets nothing apart.
        pixels: what the image files hold.

    Returns:
        The images, names by number in the mask (empty if unknown), whether 0 is ADE20K's "other", and numbers of the
        classes and of what is not scored where the layout knows them.

    Raises:
        UserError: if nothing is found, or images lack masks.
    """
    if data in BUILT_IN:
        check_colour(data, channels, pixels)
        return _built_in(data, split)
    check_folder_of_masks(data)
    root = Path(data).expanduser()
    pairs = find_pairs(root, split, val_fraction)
    homes = [root, *pairs.train[0][1].relative_to(root).parents][1:]
    files = (root / home / name for home in reversed(homes) for name in CLASS_FILES)
    names, colours = read_classes(classes or next((file for file in files if file.is_file()), None))
    train, test = (PairedFiles(part, channels, colours, pixels) for part in (pairs.train, pairs.test))
    values = None if names or not pairs.names else tuple(pairs.names)
    return MaskedImages(
        train, test, names or dict(pairs.names), pairs.zero_is_other, pairs.split, values, pairs.ignore, pairs.notes
    )


def _built_in(data: str, split: str | None) -> MaskedImages:
    held = {"builtin": "test", "shapes": "val"}[data]
    if split not in (None, held):
        raise UserError(f"--split {split}: {data} has no such part", hint=f"--split {held}")
    train: MosaicSource | ShapeSource = MosaicSource("train") if data == "builtin" else ShapeSource("train")
    test: MosaicSource | ShapeSource = MosaicSource("test") if data == "builtin" else ShapeSource("val")
    return MaskedImages(train, test, dict(enumerate(train.mask_classes)), False, held)


def _orientation(path: Path) -> int:
    """The EXIF orientation of a photo that can be read; 1 if it has none."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # arrays have none, and a parser of random bytes may raise anything
        return 1

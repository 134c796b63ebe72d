"""Images with a class number for every pixel: where they lie, which numbers mean what, and what may be wrong with them.

Four layouts are read, the first that fits:

- ADE20K: ``images/{training,validation}`` beside ``annotations/{training,validation}``; 0 is "other" and not scored.
- Pascal VOC: ``JPEGImages``, ``SegmentationClass`` and ``ImageSets/Segmentation/{train,val}.txt``.
- ``{train,val}/{images,masks}``; instead of ``val`` also ``valid``, ``validation`` or ``test``.
- the built-in sets: ``builtin`` (mosaics of the photos' textures) and ``shapes`` (generated).

Where the classes file gives each class a colour, masks are pictures in these colours.

A mask belongs to the image of the same name, whatever its suffix and in the same subfolder.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim.data.builtin import MosaicSource, check_colour
from mim.data.images import ImageError, read_colours, read_image, read_numbers
from mim.data.loading import reading
from mim.data.pixels import EIGHT_BIT, Pixels
from mim.data.shapes import ShapeSource
from mim.data.sources import HELD_OUT, FolderSource
from mim.errors import UserError

Colour = tuple[int, int, int]
_PACKED = np.array([1 << 16, 1 << 8, 1], dtype=np.int64)  # red, green and blue as one number

IGNORE = -1
"""Class of the pixels that are neither learnt nor scored."""

CLASS_FILES = ("mask_classes.txt", "classes.txt", "objectInfo150.txt", "class_dict.csv", "label_colors.txt")
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
        pairs: Sequence[tuple[Path, Path]],
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
        image_path, mask_path = self.pairs[index]
        try:
            with reading(str(image_path)):
                image = read_image(image_path, self.channels, pixels=self.pixels)
            with reading(str(mask_path)):
                numbers = read_numbers(mask_path) if self.colours is None else self._by_colour(mask_path)
        except ImageError as error:
            hint = "remove the pair"
            if error.path == str(mask_path):
                hint = (
                    "class numbers as an 8-bit grey or palette PNG   or   --classes FILE   with lines  128 64 128 road"
                )
            raise UserError(f"{error.path} cannot be used", why=error.reason, hint=hint) from error
        if image.shape[1:] != numbers.shape:
            (height, width), (rows, columns) = image.shape[1:], numbers.shape
            raise UserError(
                f"{mask_path} has {columns}x{rows} pixels, its image {width}x{height}",
                why="every pixel of an image needs its class",
                hint=f"resize the mask without interpolation (nearest), or remove {image_path} and its mask",
            )
        return image, torch.from_numpy(numbers.astype(np.int64))

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


def open_masks(
    data: str,
    channels: int = 3,
    split: str | None = None,
    classes: Path | None = None,
    pixels: Pixels = EIGHT_BIT,
) -> MaskedImages:
    """What ``--data`` names.

    Args:
        data: a folder in one of the layouts above, or a built-in set.
        channels: of the images.
        split: part that is scored; the first held-out part of the layout if not given.
        classes: file that names the classes, see :func:`read_classes`.
        pixels: what the image files hold.

    Returns:
        The images, names by number in the mask (empty if unknown), and whether 0 is ADE20K's "other".

    Raises:
        UserError: if nothing is found, or images lack masks.
    """
    if data in ("builtin", "shapes"):
        check_colour(data, channels)
        return _built_in(data, split)
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(
            f"--data {data}: no such folder", hint="--data builtin   or   --data shapes   for built-in masks"
        )
    names, colours = read_classes(classes or next((root / n for n in CLASS_FILES if (root / n).is_file()), None))
    if (root / "annotations").is_dir() and (root / "images").is_dir():
        parts, held = ("training", split or "validation"), True
        pairs = [_pairs(root / "images" / part, root / "annotations" / part) for part in parts]
    elif (root / "SegmentationClass").is_dir():
        parts, held = ("train", split or "val"), False
        pairs = [_listed(root, part) for part in parts]
    else:
        parts, held = ("train", split or _held_out(root)), False
        pairs = [_pairs(root / part / "images", root / part / "masks") for part in parts]
    train, test = (PairedFiles(part, channels, colours, pixels) for part in pairs)
    return MaskedImages(train, test, names, held, parts[1])


def read_classes(file: Path | None) -> tuple[dict[int, str], list[Colour] | None]:
    """Class names by number in the mask and, if the file has them, the classes' colours, the first for 0.

    Args:
        file: a name in each line, the first for 0; lines of a number and a name; ADE20K's ``objectInfo150.txt``; or
            lines with a colour before or behind the name, as ``128 64 128 road`` or ``road,128,64,128``.
    """
    if file is None:
        return {}, None
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--classes {file} cannot be read", why=str(error), hint="a text file, a name per line"
        ) from error
    coloured = [match for line in lines if (match := _COLOURED.fullmatch(line))]
    if coloured and len(coloured) >= len(lines) - 1:  # a table may have a heading
        return _names_and_colours(coloured, file)
    numbered = [re.match(r"(\d+)\s+(?:.*\t)?(.+)", line) for line in lines]
    if any(numbered):  # a heading has no number
        return {int(match[1]): match[2].strip() for match in numbered if match}, None
    return dict(enumerate(lines)), None


_RGB = r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})"
_COLOURED = re.compile(rf"{_RGB}[\s,]+(\S.*)|(\S.*?)[\s,]+{_RGB}")


def _names_and_colours(lines: Sequence[re.Match[str]], file: Path) -> tuple[dict[int, str], list[Colour]]:
    names, colours = {}, []
    for number, line in enumerate(lines):
        *before, first, last, r, g, b = line.groups()
        red, green, blue = (int(value) for value in (before if first else (r, g, b)))
        names[number] = first or last
        colours.append((red, green, blue))
        if max(colours[-1]) > 255 or colours.index(colours[-1]) < number:
            raise UserError(
                f"--classes {file}: {names[number]} has the colour {red} {green} {blue}",
                why="values go from 0 to 255, and each class has a colour of its own",
                hint="lines such as  128 64 128 road   or   road,128,64,128",
            )
    return names, colours


@dataclass(frozen=True)
class ClassNumbers:
    """What the numbers of a mask mean.

    Args:
        count: classes that are learnt and scored.
        ignore: numbers of pixels that are not.
        zero_is_other: 0 is not scored and classes begin at 1 (``reduce_zero_label``).
    """

    count: int
    ignore: tuple[int, ...] = (255,)
    zero_is_other: bool = False

    def __call__(self, mask: Tensor, name: str) -> Tensor:
        """Classes ``(H, W)`` int16 from 0, :data:`IGNORE` where nothing is scored.

        Args:
            mask: ``(H, W)`` whole numbers.
            name: of the mask, for messages.

        Raises:
            UserError: if the mask holds a number that is neither a class nor ignored.
        """
        numbers = mask.long()
        first = int(self.zero_is_other)
        ignored = torch.isin(numbers, torch.tensor([*self.ignore, *range(first)]))
        wrong = ~ignored & ((numbers < first) | (numbers >= self.count + first))
        if wrong.any():
            raise self._mistake(numbers, int(numbers[wrong].max()), name)
        return torch.where(ignored, IGNORE, numbers - first).to(torch.int16)

    def _mistake(self, numbers: Tensor, wrong: int, name: str) -> UserError:
        first = int(self.zero_is_other)
        others = ",".join(map(str, sorted({*self.ignore, wrong})))
        more = f"--num_classes {wrong + 1 - first}    or    " if 0 < wrong < 255 else ""
        return UserError(
            f"segment: {name} holds value {wrong}, but --num_classes {self.count} allows "
            f"{first}..{self.count + first - 1}",
            why=f"values found: {ranges(torch.unique(numbers).tolist(), self.ignore)}",
            hint=f"{more}--ignore {others}",
        )


def count_classes(numbers: set[int], ignore: Sequence[int], zero_is_other: bool, data: str) -> int:
    """Classes that the numbers found in all masks stand for; refuses what cannot be class numbers."""
    scored = {number for number in numbers if number not in ignore} - ({0} if zero_is_other else set())
    if not scored or max(scored) - zero_is_other < 1:
        raise UserError(
            f"--data {data}: the masks hold fewer than two classes",
            why=f"values found: {ranges(sorted(numbers), ignore)}",
            hint="number the classes 0, 1, 2, ...; 255 is kept for pixels without a class (--ignore)",
        )
    if max(scored) > 4 * len(scored) + 100:
        raise UserError(
            f"--data {data}: the masks do not hold class numbers",
            why=f"values found: {ranges(sorted(numbers), ignore)}",
            hint="number the classes 0, 1, 2, ...   or   --num_classes N   if there really are so many",
        )
    return max(scored) + 1 - int(zero_is_other)


def ranges(numbers: Sequence[int], ignored: Sequence[int] = ()) -> str:
    """``0-12, 255 (ignored)``."""
    texts: list[str] = []
    kept = [number for number in numbers if number not in ignored]
    start = 0
    for place, number in enumerate(kept):
        if place + 1 == len(kept) or kept[place + 1] != number + 1:
            texts.append(str(number) if kept[start] == number else f"{kept[start]}-{number}")
            start = place + 1
    if len(texts) > 8:
        texts = [*texts[:7], "...", texts[-1]]
    return ", ".join([*texts, *(f"{number} (ignored)" for number in numbers if number in ignored)])


def _built_in(data: str, split: str | None) -> MaskedImages:
    held = {"builtin": "test", "shapes": "val"}[data]
    if split not in (None, held):
        raise UserError(f"--split {split}: {data} has no such part", hint=f"--split {held}")
    train: MosaicSource | ShapeSource = MosaicSource("train") if data == "builtin" else ShapeSource("train")
    test: MosaicSource | ShapeSource = MosaicSource("test") if data == "builtin" else ShapeSource("val")
    return MaskedImages(train, test, dict(enumerate(train.mask_classes)), False, held)


def _held_out(root: Path) -> str:
    """The part that is scored; refuses a folder of no known layout."""
    held = next((part for part in HELD_OUT if (root / part / "masks").is_dir()), None)
    if held is not None and (root / "train" / "masks").is_dir():
        return held
    found = ", ".join(sorted(f"{path.name}/" for path in root.iterdir() if path.is_dir())[:6]) or "no folders"
    inside = next((path for name in ("ADEChallengeData2016", "VOC2012") for path in root.rglob(name)), None)
    raise UserError(
        f"--data {root}: no images with masks",
        why=f"found {found}; readable are train/ and val/ with images/ and masks/, ADE20K's and Pascal VOC's folders",
        hint=f"--data {inside}" if inside else "python tools/make_shapes.py --out data/shapes   shows the layout",
    )


def _pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Images and masks of the same name, in the order of the images."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder", hint="images and masks lie side by side, in images/ and masks/"
            )
    by_name = {_stem(path, masks): path for path in _files(masks)}
    return _matched([(path, by_name.get(_stem(path, images))) for path in _files(images)], masks)


def _listed(root: Path, part: str) -> list[tuple[Path, Path]]:
    """The pairs that a Pascal VOC list names."""
    file = root / "ImageSets" / "Segmentation" / f"{part}.txt"
    if not file.is_file():
        raise UserError(f"{file}: no such list", hint="--split val   or the name of another list in that folder")
    images, masks = (
        {_stem(p, home): p for p in _files(home)} for home in (root / "JPEGImages", root / "SegmentationClass")
    )
    names = file.read_text().split()
    lost = [name for name in names if name not in images]
    if lost or not names:
        raise UserError(f"{file} names {len(lost)} images that are not in JPEGImages/", why=f"first: {lost[:1]}")
    return _matched([(images[name], masks.get(name)) for name in names], root / "SegmentationClass")


def _matched(pairs: Sequence[tuple[Path, Path | None]], masks: Path) -> list[tuple[Path, Path]]:
    lost = [image for image, mask in pairs if mask is None]
    if lost:
        raise UserError(
            f"{len(lost)} of {len(pairs)} images have no mask in {masks}",
            why=f"first: {lost[0]}",
            hint=f"add {masks / lost[0].with_suffix('.png').name}   or remove the image",
        )
    return [(image, mask) for image, mask in pairs if mask is not None]


def _files(folder: Path) -> list[Path]:
    source = FolderSource(folder)
    return [source.encoded(index) for index in range(len(source))]


def _stem(path: Path, root: Path) -> str:
    return str(path.relative_to(root).with_suffix(""))

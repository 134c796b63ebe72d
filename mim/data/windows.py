"""Large images as windows: each is an image of its own, read by offset where the file allows that.

Windows lie on a grid from the upper left. The last of a row or column is moved inwards, so that all have one size and
every pixel is in one; an image that is smaller than a window in one direction gives windows that are smaller there.
An image that is smaller in both stays whole.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from mim.data.arrays import NPY_MAGIC, TIFF_MAGIC, Box, NpyParts, Stored, with_channels
from mim.data.bad_files import refuse_channels
from mim.data.dicom import is_dicom
from mim.data.files import (
    MAX_ASPECT,
    Header,
    ImageError,
    NodataError,
    UnmeasuredError,
    check_ordinary,
    image_error,
    read_file,
)
from mim.data.flat import FlatArray, Labels
from mim.data.images import MAX_NODATA, as_image, pixel_type, read_stored
from mim.data.loading import reading
from mim.data.pictures import FORMATS, eight_bit, orientation
from mim.data.pixels import Pixels
from mim.data.sources import Examined, FileSource, FolderSource, ListSource, Source
from mim.data.tiff import TiffParts, tiff_sides
from mim.errors import UserError

SIDES = (16, 8192)
"""Pixels per side of a window, at least and at most."""
MAX_WINDOWS = 1 << 26
"""Windows in a data set, at most: their order is drawn anew in every epoch."""
MAX_PICTURE_PIXELS = 1 << 24
"""Of JPEG, PNG and other files that are decoded whole for each window; larger ones are refused."""
_OPEN = 64  # files whose layout a process remembers


@dataclass(frozen=True)
class Windows:
    """A grid of windows.

    Args:
        side: of a window in pixels.
        stride: pixels from one to the next.
    """

    side: int
    stride: int

    @classmethod
    def of(cls, side: int | None, stride: int | None) -> "Windows | None":
        """What the two options say; None if there are to be no windows.

        Raises:
            UserError: for what cannot be.
        """
        if side is None:
            if stride is not None:
                raise UserError(f"--stride {stride} is the distance of windows", hint=f"--windows {stride}")
            return None
        low, high = SIDES
        if not low <= side <= high:
            raise UserError(f"--windows {side}: a window has {low} to {high} pixels per side", hint="--windows 512")
        if stride is not None and stride < 1:
            raise UserError(f"--stride {stride}: windows are at least a pixel apart", hint=f"--stride {side}")
        return cls(side, stride or side)

    def counts(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of windows in an image."""
        rows, columns = (1 + max(0, ceil((length - self.side) / self.stride)) for length in (height, width))
        return rows, columns

    def box(self, number: int, height: int, width: int) -> Box:
        """The window of that number, counted row by row."""
        row, column = divmod(number, self.counts(height, width)[1])
        top, left = (
            min(place * self.stride, max(0, length - self.side)) for place, length in ((row, height), (column, width))
        )
        return Box(top, left, min(self.side, height), min(self.side, width))

    def __str__(self) -> str:
        """For people."""
        apart = f", {self.stride} apart" if self.stride != self.side else ""
        return f"windows of {self.side}x{self.side}{apart}"


class WindowSource(FileSource):
    """The windows of the images of another source, image by image; each has the label of its image.

    An image that cannot be cut is in ``damaged``. Windows of which next to nothing was measured are items like others;
    reading one raises ``UnmeasuredError``, and whoever trains takes another one instead.

    Args:
        files: whole images.
        windows: the grid.
        pixels: what is known of them; their bands say whether files may have any number of channels.

    Raises:
        UserError: if there are too many windows.
    """

    unit = "windows"

    def __init__(self, files: FileSource, windows: Windows, pixels: Pixels) -> None:
        super().__init__(files.name, (), None, files.channels)
        self.files, self.windows, self.pixels = files, windows, pixels
        self.ignored, self.unclear, self.part, self.classes = files.ignored, files.unclear, files.part, files.classes
        found = self._sizes()
        self.damaged = [*files.damaged, *(size for size in found if isinstance(size, ImageError))]
        good = [(number, *size) for number, size in enumerate(found) if not isinstance(size, ImageError)]
        self._images = FlatArray(np.array(good, dtype=np.int64).reshape(-1, 3))  # number in ``files``, height, width
        counts = [rows * columns for rows, columns in (windows.counts(*size) for _, *size in good)]
        self._ends = FlatArray(np.cumsum([0, *counts]))
        if len(self) > MAX_WINDOWS:
            hint = f"--windows {windows.side} --stride {windows.side}"
            raise UserError(f"{len(self):,} {windows}, more than {MAX_WINDOWS:,}", hint=hint)
        own = files.labels
        self.labels = own and Labels(
            label for count, row in zip(counts, good, strict=True) for label in [own[row[0]]] * count
        )
        self.notes = [*files.notes, self._note(counts)]

    def __len__(self) -> int:
        """Number of windows."""
        return int(self._ends[-1])

    def describe(self, index: int) -> str:
        """The image's path and, if it is cut, rows and columns of the window."""
        number, box = self._place(index)
        name = self.files.describe(number)
        return f"{name}[{box.top}:{box.rows.stop},{box.left}:{box.columns.stop}]" if box else name

    def read(self, index: int) -> Tensor:
        """``(C, h, w)`` of the type that ``pixels`` names.

        Raises:
            UnmeasuredError: if next to nothing of the window was measured.
            ImageError: if it cannot be read.
        """
        number, box = self._place(index)
        if box is None:
            return self._whole().read(number)
        name = self.describe(index)
        with reading(name):
            try:
                return _image(self._stored(number, box), self.channels, self.pixels)
            except NodataError as error:
                raise UnmeasuredError(name, str(error)) from None
            except Exception as error:  # as in read_image
                raise image_error(name, error) from None

    def kind(self, index: int, image: Tensor) -> str:
        """Type of the numbers in the file."""
        number, box = self._place(index)
        if box is None:
            return self._whole().kind(number, image)
        try:
            return pixel_type(self._stored(number, box._replace(height=1, width=1)))
        except Exception as error:  # as in read_image
            raise image_error(self.describe(index), error) from None

    def examine(self, index: int) -> Examined:
        """See :meth:`FileSource.examine`."""
        number, box = self._place(index)
        if box is None:
            return self._whole().examine(number)
        image = self.read(index)
        stored = self._stored(number, box._replace(height=1, width=1))
        header = Header("windows", f"{stored.values.dtype}x{stored.values.shape[2]}", box.width, box.height)
        content = np.ascontiguousarray(image.numpy()).tobytes()
        return Examined(image, header, pixel_type(stored), hashlib.blake2b(content, digest_size=16).digest())

    def encoded(self, index: int) -> Path | bytes:
        """The whole image that the window is in."""
        return self.files.encoded(self._place(index)[0])

    def whole_files(self, good: Sequence[int]) -> list[int]:
        """Numbers of the images all of whose windows are among ``good``."""
        windows = np.bincount(np.searchsorted(self._ends, good, side="right") - 1, minlength=len(self._images))
        return [int(number) for number in self._images[windows == np.diff(self._ends), 0]]

    def _whole(self) -> FileSource:
        self.files.pixels = self.pixels
        return self.files

    def _place(self, index: int) -> tuple[int, Box | None]:
        """Number of the image, and the window; None if that is the image itself."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        row = int(np.searchsorted(self._ends, index, side="right")) - 1
        number, height, width = self._images[row].tolist()
        whole = max(height, width) <= self.windows.side
        return number, None if whole else self.windows.box(index - int(self._ends[row]), height, width)

    def _stored(self, number: int, box: Box) -> Stored:
        path = Path(self.files.encoded(number))  # type: ignore[arg-type]  # of files
        return _opened(path, path.stat().st_mtime_ns, self.channels, self.pixels).read(box)

    def _sizes(self) -> "list[tuple[int, int] | ImageError]":
        """Height and width of every image, or why it cannot be read."""
        with ThreadPoolExecutor() as threads:
            return list(threads.map(self._size, range(len(self.files))))

    def _size(self, number: int) -> "tuple[int, int] | ImageError":
        name = self.files.describe(number)
        try:
            path = Path(self.files.encoded(number))  # type: ignore[arg-type]  # of files
            check_ordinary(path)
            sides = _sides(path, self.channels, self.pixels)
            if max(sides) <= self.windows.side:
                return sides
            parts = _open(path, self.channels, self.pixels)
            self._check(parts)
            if not isinstance(parts, PictureParts):  # whose channels are known when they are decoded
                with_channels(parts.read(Box(0, 0, 1, 1)), self.channels, self.pixels.bands)
            return parts.height, parts.width
        except Exception as error:  # a parser of random bytes
            return image_error(name, error)

    def _check(self, parts: "_Parts") -> None:
        """Refuses a large image that is no raster, or so thin that its windows are."""
        sides = [min(self.windows.side, side) for side in (parts.height, parts.width)]
        if max(sides) > MAX_ASPECT * min(sides):
            raise ValueError(f"{parts.width}x{parts.height} pixels, longer than {MAX_ASPECT}:1")
        if isinstance(parts, PictureParts) and parts.height * parts.width > MAX_PICTURE_PIXELS:
            raise ValueError(
                f"{parts.width}x{parts.height} pixels of {parts.format}, which is decoded whole for each window: more "
                f"than {MAX_PICTURE_PIXELS / 1e6:.0f} million are too many; write it as TIFF in tiles"
            )

    def _note(self, counts: Sequence[int]) -> str:
        cut = int((self._images[:, 1:].max(axis=1) > self.windows.side).sum())
        whole = f"; {len(counts) - cut:,} are smaller and stay whole" if cut < len(counts) else ""
        return f"{cut:,} of {len(counts):,} images are cut into {self.windows}: {len(self):,} in all{whole}"


def cut(source: Source, data: str, windows: Windows, pixels: Pixels, option: str = "--in_chans") -> WindowSource:
    """The windows of a source.

    Args:
        source: opened.
        data: what the user calls it.
        windows: the grid.
        pixels: what is known of them.
        option: that says how many channels images have.

    Raises:
        UserError: if it is not made of files, if every file is to have a scale of its own, if none can be cut, or as
            ``WindowSource`` says.
    """
    if not isinstance(source, FolderSource | ListSource):
        why = "windows are read by offset from files in a folder or a list"
        raise UserError(f"--windows {windows.side}: not of {data}", why=why, hint="leave --windows out")
    if pixels.type == "per_file":
        why = "every window would have another scale"
        raise UserError("--windows and --value_range per_file exclude each other", why=why, hint="--value_range auto")
    found = WindowSource(source, windows, pixels)
    refuse_channels(data, found.damaged, source.channels, len(source), option, pixels.bands)
    if not len(found):
        why = f"the first is {found.damaged[0]}"
        raise UserError(f"--data {data} --windows {windows.side}: none of {len(source):,} images can be read", why=why)
    return found


class PictureParts:
    """Boxes of a picture that has to be decoded whole for each.

    Args:
        path: the file.
        channels: of the images.
        pixels: of the data set.
    """

    def __init__(self, path: Path, channels: int, pixels: Pixels) -> None:
        self.path, self.channels, self.pixels = path, channels, pixels
        try:
            with Image.open(path, formats=FORMATS) as image:
                self.format = image.format or "?"
                swapped = orientation(image) in (5, 6, 7, 8)
                self.width, self.height = image.size[::-1] if swapped else image.size
        except Image.DecompressionBombError as error:
            raise ValueError(f"{str(error).partition(',')[0]}; write it as TIFF in tiles") from None

    def read(self, box: Box) -> Stored:
        """``box`` of the upright picture."""
        stored = read_stored(read_file(self.path), self.channels, self.pixels)
        return stored._replace(values=stored.values[box.rows, box.columns])


_Parts = TiffParts | NpyParts | PictureParts


def _open(path: Path, channels: int, pixels: Pixels) -> _Parts:
    """A file as something that boxes can be read of; its pixels are not read yet."""
    with path.open("rb") as file:
        magic = file.read(132)
    expected = None if pixels.bands else channels
    if magic.startswith(NPY_MAGIC):
        return NpyParts(path, expected)
    if magic.startswith(TIFF_MAGIC):
        return TiffParts(path, expected)
    if is_dicom(magic):
        raise ValueError("a DICOM file, which is not cut into windows; write it as TIFF in tiles")
    return PictureParts(path, channels, pixels)


def _sides(path: Path, channels: int, pixels: Pixels) -> tuple[int, int]:
    """Height and width of an image of any kind, cheaply; those of a TIFF as it lies."""
    with path.open("rb") as file:
        if file.read(4) in TIFF_MAGIC:
            return tiff_sides(path)
    parts = _open(path, channels, pixels)
    return parts.height, parts.width


@lru_cache(_OPEN)
def _opened(path: Path, time: int, channels: int, pixels: Pixels) -> _Parts:
    """As :func:`_open`, remembered until the file's time changes."""
    return _open(path, channels, pixels)


def _image(stored: Stored, channels: int, pixels: Pixels) -> Tensor:
    """As :func:`as_image`; 8-bit colours with alpha are laid over white as in pictures, and nothing is scaled."""
    values = stored.values
    if pixel_type(stored) != "uint8":
        if pixels.type == "uint8":
            raise ValueError(f"holds {pixel_type(stored)}, the other files uint8; windows are not scaled one by one")
        return as_image(stored, channels, pixels)
    if stored.alpha and channels in (1, 3) and not pixels.bands and values.shape[2] in (2, 4):
        if float((values[..., -1] == 0).mean()) > MAX_NODATA:
            raise NodataError(f"more than {MAX_NODATA:.0%} of its pixels are transparent")
        flat = np.asarray(eight_bit(Image.fromarray(values, "LA" if values.shape[2] == 2 else "RGBA"), channels))
        stored = Stored(flat[..., None] if flat.ndim == 2 else flat, stored.nodata)
    return as_image(stored, channels, pixels)

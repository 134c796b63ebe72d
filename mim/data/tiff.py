"""TIFF files through tifffile: whole pictures, and parts of large ones that are read by offset.

A file is believed only as far as it fits its bytes; sizes are checked before anything is decoded.
"""

import re
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import islice
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mim.data.arrays import Box, Stored, check_array, check_kind, lying, turned
from mim.data.files import check_size

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

MAX_SEGMENT_BYTES = 1 << 26
"""64 MiB: decoded size of a strip or tile, where a part of a picture is wanted."""
_BITS, _DESCRIPTION, _SAMPLE_FORMAT, _ORIENTATION, _GDAL_NODATA = 258, 270, 339, 274, 42113  # TIFF tags
_PALETTE, _SEPARATED, _LAB = 3, 5, 8  # values of TIFF's PhotometricInterpretation
_JPEGS = (6, 7, 34892, 33007)  # values of TIFF's Compression
_COUNTED = 64  # pages of a stack, at most


def read_tiff(data: bytes, channels: int | None) -> Stored:
    """The first picture of a TIFF; ``channels`` are expected, any number if not given."""
    import tifffile  # 0.1 s, and few need it

    with tifffile.TiffFile(BytesIO(data)) as file:
        pages = _pages(file, channels)
        first = pages[0]
        check_size(first.imagewidth, first.imagelength)
        check_array((*first.shape, len(pages)) if first.ndim == 2 else first.shape, first.dtype, first.chunks)
        for page in pages:
            _check_segments(page, len(data))
        parts = [np.asarray(page.asarray(maxworkers=1)) for page in pages]
        parts = [np.moveaxis(part, 0, -1) if first.axes == "SYX" else part for part in parts]
        values = parts[0] if parts[0].ndim == 3 else np.stack(parts, axis=-1)  # (H, W, C)
        count = sum(1 for _ in islice(file.pages, _COUNTED)) if len(pages) == 1 else 1
        return _stored(values, first)._replace(pages=count)


def is_plain(data: bytes) -> bool:
    """Whether a TIFF is one of 8 bit per channel that Pillow knows, and no stack whose pages are channels."""
    try:
        with Image.open(BytesIO(data), formats=("TIFF",)) as image:
            tags = image.tag_v2  # type: ignore[attr-defined]  # of a TIFF
            bits, kinds = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))
            return max(bits) <= 8 and set(kinds) == {1} and _described_channels(str(tags.get(_DESCRIPTION, "")))[0] == 1
    except UnidentifiedImageError:
        return False


def tiff_sides(path: Path) -> tuple[int, int]:
    """Height and width of the first picture as it lies in the file."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        first: TiffPage = file.pages[0]  # type: ignore[assignment]  # a whole page, as it is the first
        return first.imagelength, first.imagewidth


class TiffParts:
    """Boxes of the first picture of a TIFF, read by offset: only strips or tiles that they touch are decoded.

    Args:
        path: the file.
        channels: expected, any number if not given.

    Attributes:
        height: upright.
        width: upright.

    Raises:
        ValueError: for what is not read at all, or not in parts.
    """

    def __init__(self, path: Path, channels: int | None) -> None:
        import tifffile

        self.path = path
        with tifffile.TiffFile(path) as file:
            pages = _pages(file, channels)
            self.first = first = pages[0]
            check_kind(first.shape, first.dtype)
            for page in pages:
                _check_segments(page, path.stat().st_size)
            self.pages = [_Mapped(path, page) if page.is_final else _Segments(path, page) for page in pages]
        sides = first.imagelength, first.imagewidth
        self.height, self.width = sides[::-1] if _orientation(first) in (5, 6, 7, 8) else sides

    def read(self, box: Box) -> Stored:
        """``box`` of the upright picture."""
        place = lying(box, self.height, self.width, _orientation(self.first))
        return _stored(np.concatenate([page.read(place) for page in self.pages], axis=-1), self.first)


class _Mapped:
    """A page whose samples lie in the file one after the other as they are."""

    def __init__(self, path: Path, page: "TiffPage") -> None:
        assert page.dtype is not None  # checked
        self.path, self.shape, self.offset = path, page.shaped, page.dataoffsets[0]
        self.dtype = page.dtype.newbyteorder(page.parent.byteorder)

    def read(self, box: Box) -> NDArray[Any]:
        """``(h, w, samples)``."""
        values = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[:, 0, box.rows, box.columns]
        return _samples_last(values)


class _Segments:
    """A page in strips or tiles, compressed or not."""

    def __init__(self, path: Path, page: "TiffPage") -> None:
        self.path, self.page = path, page
        self.length, self.width = page.chunks[:2]
        planes, _, height, width, _ = page.shaped
        self.down, self.across = ceil(height / self.length), ceil(width / self.width)
        count = planes * self.down * self.across
        places = list(zip(page.dataoffsets, page.databytecounts, strict=False))
        if len(places) < count:
            raise ValueError(f"a TIFF of {count:,} strips or tiles that names {len(places):,}")
        self.places = np.array(places, dtype=np.int64)  # (segments, 2)
        size = prod(page.chunks) * page.dtype.itemsize  # type: ignore[union-attr]  # checked
        if size > MAX_SEGMENT_BYTES:
            most = MAX_SEGMENT_BYTES >> 20
            raise ValueError(f"stored in pieces of {size >> 20} MiB; windows are read from pieces of {most} or less")
        self.settings: dict[str, Any] = {"_fullsize": page.is_tiled}
        if page.compression in _JPEGS:
            self.settings |= {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        self.decode: Callable[..., Any] = page.decode

    def read(self, box: Box) -> NDArray[Any]:
        """``(h, w, samples)``; what has no segment in the file is nodata, or 0."""
        planes, *_, contiguous = self.page.shaped
        values = np.full((planes, box.height, box.width, contiguous), self.page.nodata, self.page.dtype)
        with self.path.open("rb") as file:
            for index in self._touched(box):
                segment, (plane, _, top, left, _), _ = self._segment(file, index)
                if segment is not None:
                    _overlay(values[plane], segment[0], top - box.top, left - box.left)
        return _samples_last(values)

    def _touched(self, box: Box) -> Iterator[int]:
        for plane in range(self.page.shaped[0]):
            for row in range(box.top // self.length, ceil(box.rows.stop / self.length)):
                for column in range(box.left // self.width, ceil(box.columns.stop / self.width)):
                    yield (plane * self.down + row) * self.across + column

    def _segment(self, file: BinaryIO, index: int) -> Any:  # noqa: ANN401 - as tifffile decodes it
        offset, length = self.places[index].tolist()
        file.seek(offset)
        data = file.read(length) if length else None
        if data is not None and len(data) < length:
            raise ValueError("image file is truncated")
        return self.decode(data, index, **self.settings)


def _overlay(values: NDArray[Any], segment: NDArray[Any], top: int, left: int) -> None:
    """Copies ``segment (h, w, C)``, whose corner lies at ``top, left``, to where it lies in ``values (H, W, C)``."""
    height, width = values.shape[:2]
    rows, columns = (
        slice(max(0, top), max(0, top + segment.shape[0])),
        slice(max(0, left), max(0, left + segment.shape[1])),
    )
    own = segment[max(0, -top) : height - top, max(0, -left) : width - left]
    values[rows, columns] = own


def _samples_last(values: NDArray[Any]) -> NDArray[Any]:
    """``(h, w, S * C)`` of ``(S, h, w, C)``."""
    return np.moveaxis(values, 0, 2).reshape(*values.shape[1:3], -1)


def _pages(file: "TiffFile", channels: int | None) -> list["TiffPage"]:
    """The pages of the first picture, of a kind that is read."""
    first: TiffPage = file.pages[0]  # type: ignore[assignment]  # a whole page, as it is the first
    if first.axes not in ("YX", "YXS", "SYX") or (
        first.photometric in (_PALETTE, _SEPARATED, _LAB) and channels in (1, 3)
    ):
        kind = getattr(first.photometric, "name", first.photometric)
        raise ValueError(f"a TIFF of axes {first.axes}, {kind}, {first.dtype}, which is not read")
    pages = _channel_pages(file, first, channels)
    if any(page.shape != first.shape or page.dtype != first.dtype for page in pages):
        raise ValueError("pages of different shapes")
    return pages


def _stored(values: NDArray[Any], first: "TiffPage") -> Stored:
    """What ``values (H, W, C)``, as they lie in the file, mean."""
    if first.photometric == 0 and values.dtype.kind == "u":  # white is 0
        values = values.dtype.type((1 << first.bitspersample) - 1) - values
    extra = [int(sample) for sample in first.extrasamples or ()]
    return Stored(
        turned(values, _orientation(first)),
        nodata=_named_nodata(first),
        colours=first.photometric in (2, 6),
        alpha=bool(extra) and extra[-1] in (1, 2),
    )


def _orientation(page: "TiffPage") -> int:
    return int(page.tags.valueof(_ORIENTATION, 1))


def _channel_pages(file: "TiffFile", first: "TiffPage", channels: int | None) -> list["TiffPage"]:
    """The pages that are channels of the first picture: as ImageJ or OME name them, or all of a plain stack.

    Never the whole chain of pages: in a damaged file it may be a ring.
    """
    count, step = _described_channels(first.description)
    if first.ndim != 2 or (count == 1 and channels in (1, 3)):
        return [first]
    if count == 1:  # nobody has said what the pages are: channels, if there are as many
        pages = list(islice(file.pages, channels + 1 if channels else _COUNTED))
        return pages if len(pages) > 1 else [first]  # type: ignore[return-value]
    pages = list(islice(file.pages, 0, (count - 1) * step + 1, step))
    if len(pages) < count:
        raise ValueError(f"a stack that names {count} channels and holds {len(pages)} of their pages")
    return pages  # type: ignore[return-value]


def _described_channels(description: str) -> tuple[int, int]:
    """Channels that ImageJ or OME say a stack has, and the pages from one to the next."""
    if description.startswith("ImageJ="):
        found = re.search(r"^channels=(\d{1,4})$", description, re.MULTILINE)
        return (max(1, int(found[1])) if found else 1), 1
    pixels = re.search(r"<Pixels\b[^>]{0,4000}>", description) if "OME" in description else None
    if pixels is None:
        return 1, 1
    named = dict(re.findall(r'\b(Size[CZT]|DimensionOrder)="(\w{1,9})"', pixels[0]))
    sizes = {
        axis: int(named.get(f"Size{axis}", "1")) if named.get(f"Size{axis}", "1").isdecimal() else 1 for axis in "CZT"
    }
    order = named.get("DimensionOrder", "XYCZT")
    return max(1, sizes["C"]), prod(sizes.get(axis, 1) for axis in order[2 : order.find("C")])


def _check_segments(page: "TiffPage", length: int) -> None:
    """Refuses a page whose data end beyond the file."""
    ends = [offset + size for offset, size in zip(page.dataoffsets, page.databytecounts, strict=False) if size]
    if ends and max(ends) > length:
        raise ValueError(f"image file is truncated: {max(ends) - length:,} bytes are missing")
    if not ends:
        raise ValueError("a TIFF without image data")


def _named_nodata(page: "TiffPage") -> float | None:
    """What GDAL has written down."""
    try:
        return float(page.tags.valueof(_GDAL_NODATA, ""))
    except (ValueError, TypeError):
        return None

"""Numbers of any type and any count of channels: ``.npy``, and pictures of more than 8 bit; ``tiff.py`` reads TIFF.

Headers are believed only as far as they fit the bytes at hand; sizes are checked before anything is decoded.
"""

from collections.abc import Sequence
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mim.data.files import AS_TILES, MAX_ARRAY_BYTES, ChannelsError, check_size

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_MAGIC = b"\x93NUMPY"
_CODESTREAM = b"\xff\x4f\xff\x51"
JPEG2000_MAGIC = (b"\0\0\0\x0cjP  ", _CODESTREAM)
PNG_MAGIC = b"\x89PNG"
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # as Pillow turns colours grey


class Stored(NamedTuple):
    """What a file holds.

    Attributes:
        values: ``(H, W, C)`` numbers, upright.
        nodata: number that the file says stands for "not measured".
        colours: three channels are red, green and blue.
        alpha: the last channel says how opaque a pixel is.
        pages: pictures in the file, as far as they are counted.
    """

    values: NDArray[Any]
    nodata: float | None = None
    colours: bool = False
    alpha: bool = False
    pages: int = 1


class Box(NamedTuple):
    """A rectangle of pixels: its corner and its sides."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """Of the picture."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """Of the picture."""
        return slice(self.left, self.left + self.width)


def read_npy(data: bytes, channels: int | None) -> Stored:
    """An array with its channels last or first, or with none; ``channels`` are expected, any number if not given."""
    shape, fortran, dtype, offset = _npy_header(BytesIO(data))
    check_array(shape, dtype)
    # A view of the bytes at hand: no pickles, and a header cannot make us allocate what the file does not hold.
    values = np.frombuffer(data, dtype, prod(shape), offset).reshape(shape, order="F" if fortran else "C")
    values = _channels_last(values, channels)
    check_size(values.shape[1], values.shape[0])
    return Stored(values, colours=dtype == np.uint8)


class NpyParts:
    """Boxes of an array in a ``.npy`` file, of which only what they touch is read.

    Args:
        path: the file.
        channels: expected, any number if not given.

    Raises:
        ValueError: for what is no image.
    """

    def __init__(self, path: Path, channels: int | None) -> None:
        with path.open("rb") as file:
            shape, fortran, self.dtype, self.offset = _npy_header(file)
        check_kind(shape, self.dtype)
        missing = self.offset + prod(shape) * self.dtype.itemsize - path.stat().st_size
        if missing > 0:
            raise ValueError(f"image file is truncated: {missing:,} bytes are missing")
        self.path, self.channels, self.shape = path, channels, shape
        self.order: Literal["F", "C"] = "F" if fortran else "C"
        self.height, self.width = self._values().shape[:2]

    def read(self, box: Box) -> Stored:
        """``box`` of the picture."""
        return Stored(self._values()[box.rows, box.columns], colours=self.dtype == np.uint8)

    def _values(self) -> NDArray[Any]:
        """``(H, W, C)`` in the file."""
        mapped = np.memmap(self.path, self.dtype, "r", self.offset, self.shape, self.order)
        return _channels_last(mapped, self.channels)


def read_jpeg2000(data: bytes) -> Stored:
    """All components of a JPEG 2000 file; Pillow reads up to four."""
    import imagecodecs

    height, width, bits = _jpeg2000_size(data)
    check_size(width, height, AS_TILES)
    check_array((height, width, len(bits)), np.dtype(np.uint16 if max(bits) > 8 else np.uint8))
    values = imagecodecs.jpeg2k_decode(data)
    values = values[..., None] if values.ndim == 2 else values
    return Stored(values, colours=values.shape[2] >= 3, alpha=_jpeg2000_alpha(data))


def read_wide_picture(data: bytes, image: Image.Image) -> Stored | None:
    """The numbers of a picture of more than 8 bit that Pillow would cut or stretch; None if it is none."""
    import imagecodecs

    if image.format == "PNG" and data[24] == 16:
        values = imagecodecs.png_decode(data)
    elif image.format == "JPEG2000" and max(_jpeg2000_size(data)[2]) > 8:
        return read_jpeg2000(data)
    elif image.format == "PPM" and image.mode != "F" and (top := _pnm_top(image)) > 255:
        values = _pnm_values(data, image, top)
    elif image.mode in ("F", "I") or image.mode.startswith("I;"):
        image.load()
        values = np.asarray(image)
    else:
        return None
    values = values[..., None] if values.ndim == 2 else values
    if values.shape[:2] != (image.height, image.width):
        raise ValueError(f"{values.shape} numbers in a picture of {image.width}x{image.height}")
    return Stored(values, colours=values.shape[2] >= 3, alpha=values.shape[2] in (2, 4))


def with_channels(stored: Stored, channels: int, bands: Sequence[int] = ()) -> NDArray[Any]:
    """``(H, W, channels)`` of what is stored: chosen bands, or grey and colour for each other.

    Pixels that an alpha channel calls fully transparent become NaN, in float32.

    Raises:
        ChannelsError: if there are others than wanted.
    """
    values, count = stored.values, stored.values.shape[-1]
    if bands:
        if max(bands) > count:
            raise ChannelsError(count, max(bands))
        return values[..., [band - 1 for band in bands]]
    if stored.alpha and count != channels and {count - 1, channels} <= {1, 3}:
        clear = values[..., -1] == 0
        values, count = values[..., :-1], count - 1
        if clear.any():
            values = np.where(clear[..., None], np.float32(np.nan), values.astype(np.float32))
    if count == channels:
        return values
    if (count, channels) == (1, 3):
        return np.repeat(values, 3, axis=-1)
    if (count, channels) == (3, 1) and stored.colours:
        grey = values.astype(np.float32) @ _LUMA
        return (grey if values.dtype.kind == "f" else grey + 0.5).astype(values.dtype)[..., None]
    raise ChannelsError(count, channels)


def as_stored(values: NDArray[Any], nodata: Sequence[float] = ()) -> NDArray[Any]:
    """Numbers as uint8, uint16, int16 or float32, of their own memory; wider ones as float32 if that is exact enough.

    Args:
        values: ``(H, W, C)`` of any type.
        nodata: numbers that stand for "not measured", besides what is not finite.

    Returns:
        ``(H, W, C)``; float32 with NaN in all channels of a pixel that was not measured in one.
    """
    kind, size = values.dtype.kind, values.dtype.itemsize
    missing = _missing(values, nodata)
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind == "i" and size == 1:
        values = values.astype(np.int16)
    elif kind in "ui" and size > 2:
        known = values if missing is None else values[~missing]
        largest = max(abs(int(known.min(initial=0))), abs(int(known.max(initial=0))))
        if largest > 1 << 24:
            raise ValueError(f"holds whole numbers up to {largest:,}; above {1 << 24:,} float32 would change them")
        values = values.astype(np.float32)
    elif kind == "f":
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        if missing is None and not np.isfinite(values).all():
            raise ValueError("holds numbers beyond the range of float32")
    if missing is not None:
        return np.where(missing[..., None], np.float32(np.nan), values.astype(np.float32))
    native = values.astype(values.dtype.newbyteorder("="), copy=True)
    return np.ascontiguousarray(native)


def turned(values: NDArray[Any], orientation: object) -> NDArray[Any]:
    """``(H, W, C)`` upright, given EXIF's number for how it lies."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values[:, ::-1] if orientation in (2, 3, 6, 7) else values


def lying(box: Box, height: int, width: int, orientation: object) -> Box:
    """Where ``box`` of an upright picture of ``height`` and ``width`` lies in one that :func:`turned` makes upright."""
    top, left, rows, columns = box
    if orientation in (2, 3, 6, 7):
        left = width - left - columns
    if orientation in (3, 4, 7, 8):
        top = height - top - rows
    return Box(left, top, columns, rows) if orientation in (5, 6, 7, 8) else Box(top, left, rows, columns)


def check_kind(shape: tuple[int, ...], dtype: np.dtype[Any] | None) -> None:
    """Refuses what is not an image of numbers."""
    if dtype is None or dtype.kind not in "buif":
        raise ValueError(f"an array of {dtype}, not of numbers")
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"an array of shape {shape}, not of an image")


def check_array(shape: tuple[int, ...], dtype: np.dtype[Any] | None, chunks: tuple[int, ...] = ()) -> None:
    """Refuses what is not an image of numbers, or too large as a whole or by a tile."""
    check_kind(shape, dtype)
    assert dtype is not None
    size = max(prod(shape), prod(chunks)) * dtype.itemsize
    if size > MAX_ARRAY_BYTES:
        raise ValueError(f"an array of {size >> 20} MiB, more than the limit of {MAX_ARRAY_BYTES >> 20} MiB")


def _missing(values: NDArray[Any], nodata: Sequence[float]) -> NDArray[np.bool_] | None:
    """Pixels ``(H, W)`` that were not measured in one channel or more; None if there are none."""
    missing = np.zeros(values.shape[:2], bool)
    if values.dtype.kind == "f":
        missing |= ~np.isfinite(values).all(-1)
    for number in nodata:
        if values.dtype.kind == "f" or float(number).is_integer():
            missing |= (values == values.dtype.type(number) if values.dtype.kind == "f" else values == number).any(-1)
    return missing if missing.any() else None


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether the first axis runs fastest, type, and where the numbers begin."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return *readers[version](file), file.tell()


def _channels_last(values: NDArray[Any], channels: int | None) -> NDArray[Any]:
    """``(H, W, C)``."""
    return values[..., None] if values.ndim == 2 else np.moveaxis(values, _channel_axis(values.shape, channels), -1)


def _channel_axis(shape: tuple[int, ...], channels: int | None) -> int:
    """Axis of the channels, last or first."""
    if len(shape) == 2:
        return 2
    smaller = 2 if shape[2] <= shape[0] else 0
    for count in (channels, 3, 1) if channels in (1, 3) else (channels,):
        for axis in (2, 0):
            if shape[axis] == count:
                return axis
    return smaller


def _jpeg2000_size(data: bytes) -> tuple[int, int, list[int]]:
    """Height, width and bits of each component, from the SIZ segment, which every codestream begins with."""
    start = data.find(_CODESTREAM)
    if start < 0 or len(data) < start + 44:
        raise ValueError("a JPEG 2000 file without a codestream")
    right, bottom, left, top = np.frombuffer(data, ">u4", 4, start + 8).tolist()
    count = int.from_bytes(data[start + 40 : start + 42], "big")
    depths = data[start + 42 : start + 42 + 3 * count : 3]
    return bottom - top, right - left, [(depth & 0x7F) + 1 for depth in depths] or [8]


def _jpeg2000_alpha(data: bytes) -> bool:
    """Whether the file says that a component is opacity: in the box of channel definitions before the codestream."""
    start = data.find(b"cdef", 0, max(0, data.find(_CODESTREAM)))
    if start < 0:
        return False
    count = int.from_bytes(data[start + 4 : start + 6], "big")
    kinds = [data[place + 2 : place + 4] for place in range(start + 6, start + 6 + 6 * count, 6)]
    return any(kind in (b"\0\1", b"\0\2") for kind in kinds)


def _pnm_top(image: Image.Image) -> int:
    """The number that stands for white, 255 if Pillow does not say."""
    tiles: Any = getattr(image, "tile", ())
    arguments = tiles[0].args if tiles else ()
    if isinstance(arguments, tuple) and len(arguments) > 1 and isinstance(arguments[1], int):
        return arguments[1]
    return 65535 if image.mode.startswith("I") else 255


def _pnm_values(data: bytes, image: Image.Image, top: int) -> NDArray[Any]:
    """Numbers of a PGM or PPM of two bytes per sample as they are, where Pillow stretches them to full scale."""
    if data[:2] not in (b"P5", b"P6"):
        raise ValueError(f"a plain PNM up to {top}; write it as PGM, PPM or TIFF")
    shape = (image.height, image.width, 3 if data[:2] == b"P6" else 1)
    tiles: Any = getattr(image, "tile", ())
    return np.frombuffer(data, ">u2", prod(shape), tiles[0].offset).reshape(shape)

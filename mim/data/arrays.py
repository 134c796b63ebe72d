"""Numbers of any type and any count of channels: ``.npy``, TIFF through tifffile, and pictures of more than 8 bit.

Headers are believed only as far as they fit the bytes at hand; sizes are checked before anything is decoded.
"""

import re
from collections.abc import Sequence
from io import BytesIO
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mim.data.files import MAX_ARRAY_BYTES, ChannelsError, check_size

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_MAGIC = b"\x93NUMPY"
JPEG2000_MAGIC = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
PNG_MAGIC = b"\x89PNG"
_BITS, _DESCRIPTION, _SAMPLE_FORMAT, _ORIENTATION, _GDAL_NODATA = 258, 270, 339, 274, 42113  # TIFF tags
_PALETTE, _SEPARATED, _LAB = 3, 5, 8  # values of TIFF's PhotometricInterpretation
_COUNTED = 64  # pages of a stack, at most
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


def read_npy(data: bytes, channels: int | None) -> Stored:
    """An array with its channels last or first, or with none; ``channels`` are expected, any number if not given."""
    file = BytesIO(data)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = readers[version](file)
    check_array(shape, dtype)
    axis = _channel_axis(shape, channels)
    # A view of the bytes at hand: no pickles, and a header cannot make us allocate what the file does not hold.
    values = np.frombuffer(data, dtype, prod(shape), file.tell()).reshape(shape, order="F" if fortran else "C")
    values = values[..., None] if values.ndim == 2 else np.moveaxis(values, axis, -1)
    check_size(values.shape[1], values.shape[0])
    return Stored(values, colours=dtype == np.uint8)


def read_tiff(data: bytes, channels: int | None) -> Stored:
    """The first picture of a TIFF; ``channels`` are expected, any number if not given."""
    import tifffile  # 0.1 s, and few need it

    with tifffile.TiffFile(BytesIO(data)) as file:
        first: TiffPage = file.pages[0]  # type: ignore[assignment]  # a whole page, as it is the first
        if first.axes not in ("YX", "YXS", "SYX") or (
            first.photometric in (_PALETTE, _SEPARATED, _LAB) and channels in (1, 3)
        ):
            kind = getattr(first.photometric, "name", first.photometric)
            raise ValueError(f"a TIFF of axes {first.axes}, {kind}, {first.dtype}, which is not read")
        check_size(first.imagewidth, first.imagelength)
        pages = _channel_pages(file, first, channels)
        if any(page.shape != first.shape or page.dtype != first.dtype for page in pages):
            raise ValueError("pages of different shapes")
        check_array((*first.shape, len(pages)) if first.ndim == 2 else first.shape, first.dtype, first.chunks)
        for page in pages:
            _check_segments(page, len(data))
        parts = [np.asarray(page.asarray(maxworkers=1)) for page in pages]
        parts = [np.moveaxis(part, 0, -1) if first.axes == "SYX" else part for part in parts]
        values = parts[0] if parts[0].ndim == 3 else np.stack(parts, axis=-1)  # (H, W, C)
        if first.photometric == 0 and values.dtype.kind == "u":  # white is 0
            values = values.dtype.type((1 << first.bitspersample) - 1) - values
        extra = [int(sample) for sample in first.extrasamples or ()]
        return Stored(
            turned(values, first.tags.valueof(_ORIENTATION, 1)),
            nodata=_named_nodata(first),
            colours=first.photometric in (2, 6),
            alpha=bool(extra) and extra[-1] in (1, 2),
            pages=sum(1 for _ in islice(file.pages, _COUNTED)) if len(pages) == 1 else 1,
        )


def is_plain(data: bytes) -> bool:
    """Whether a TIFF is one of 8 bit per channel that Pillow knows, and no stack whose pages are channels."""
    try:
        with Image.open(BytesIO(data), formats=("TIFF",)) as image:
            tags = image.tag_v2  # type: ignore[attr-defined]  # of a TIFF
            bits, kinds = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))
            return max(bits) <= 8 and set(kinds) == {1} and _described_channels(str(tags.get(_DESCRIPTION, "")))[0] == 1
    except UnidentifiedImageError:
        return False


def read_wide_picture(data: bytes, image: Image.Image) -> Stored | None:
    """The numbers of a picture of more than 8 bit that Pillow would cut or stretch; None if it is none."""
    import imagecodecs

    if image.format == "PNG" and data[24] == 16:
        values = imagecodecs.png_decode(data)
    elif image.format == "JPEG2000" and _jpeg2000_bits(data) > 8:
        values = imagecodecs.jpeg2k_decode(data)
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


def check_array(shape: tuple[int, ...], dtype: np.dtype[Any] | None, chunks: tuple[int, ...] = ()) -> None:
    """Refuses what is not an image of numbers, or too large as a whole or by a tile."""
    if dtype is None or dtype.kind not in "buif":
        raise ValueError(f"an array of {dtype}, not of numbers")
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"an array of shape {shape}, not of an image")
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


def _jpeg2000_bits(data: bytes) -> int:
    """Bits per sample, from the SIZ segment, which every codestream begins with."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(data) < start + 44:
        raise ValueError("a JPEG 2000 file without a codestream")
    count = min(16, int.from_bytes(data[start + 40 : start + 42], "big"))
    depths = data[start + 42 : start + 42 + 3 * count : 3]
    return max((depth & 0x7F) + 1 for depth in depths) if depths else 8


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

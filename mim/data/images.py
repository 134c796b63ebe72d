"""The one reader of image files: legal images become the numbers that they hold, everything else one ``ImageError``.

Files are hostile until read. Only ordinary files are opened, only known decoders are tried, the header's size is
checked before anything is decoded, and a picture is decoded once: Pillow's second attempt at a broken file succeeds
silently. JPEGs are decoded by libjpeg-turbo in its strict mode: whatever it warns of is damage (docs/data.md).
"""

from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mim.data.arrays import (
    JPEG2000_MAGIC,
    NPY_MAGIC,
    TIFF_MAGIC,
    Stored,
    as_stored,
    read_jpeg2000,
    read_npy,
    read_wide_picture,
    turned,
    with_channels,
)
from mim.data.dicom import is_dicom, read_dicom
from mim.data.eight_bit import read_eight_bit
from mim.data.files import (
    AS_TILES,
    MAX_FILE_BYTES,
    SUFFIXES,
    ChannelsError,
    Header,
    ImageError,
    NodataError,
    check_size,
    image_error,
    name_of,
    read_file,
)
from mim.data.pictures import eight_bit, full_scale, open_picture, orientation, refuse_missing_rows, upright
from mim.data.pixels import AS_STORED, Pixels
from mim.data.tiff import is_plain, read_tiff

__all__ = [
    "MAX_FILE_BYTES",
    "SUFFIXES",
    "Header",
    "ImageError",
    "read_colours",
    "read_header",
    "read_image",
    "read_numbers",
]

MAX_NODATA = 0.9
"""Share of pixels without a measurement above which an image is refused."""


class NoPictureError(TypeError):
    """An object that is no picture of any kind, so that the next one will hardly be one."""


def read_image(source: Path | bytes, channels: int = 3, name: str = "", pixels: Pixels = AS_STORED) -> Tensor:
    """The numbers in an image file.

    Args:
        source: the file, or its content.
        channels: 1 and 3 convert between grey and colour; other counts need a TIFF or ``.npy`` file of exactly as many.
        name: what messages call ``source``; by default its path.
        pixels: type, bands and nodata of the data set; as stored unless given.

    Returns:
        ``(C, H, W)`` uint8, uint16, int16 or float32, upright; float32 with NaN for nodata.

    Raises:
        ImageError: if the file cannot be read, or only in part.
    """
    try:
        data = source if isinstance(source, bytes) else read_file(source)
        if pixels.type == "per_file":
            return read_eight_bit(data, channels)
        return as_image(read_stored(data, channels, pixels), channels, pixels)
    except Exception as error:  # a decoder of random bytes may raise anything: struct.error, TokenError, RuntimeError
        raise image_error(name or name_of(source), error) from None


def read_picture(picture: object, channels: int = 3, name: str = "image", pixels: Pixels = AS_STORED) -> Tensor:
    """An image that is in memory already, or a file.

    Args:
        picture: an image of PIL, a tensor ``(C, H, W)`` or ``(H, W)``, an array ``(H, W, C)`` or ``(H, W)``, a path, or
            the content of a file.
        channels: as in :func:`read_image`.
        name: what messages call it.
        pixels: as in :func:`read_image`.

    Returns:
        ``(C, H, W)`` in its own type, upright; shares no memory with ``picture``.

    Raises:
        NoPictureError: for what is none of these.
        ImageError: as in :func:`read_image`.
    """
    if isinstance(picture, str | Path | bytes):
        return read_image(Path(picture) if isinstance(picture, str) else picture, channels, name, pixels)
    if not isinstance(picture, Image.Image | Tensor | np.ndarray):
        raise NoPictureError(f"an item is a {type(picture).__name__}, not a picture")
    taken = "uint8" if pixels.eight_bit or pixels.type == "any" else pixels.type
    if not isinstance(picture, Image.Image) and (given := str(picture.dtype).removeprefix("torch.")) != taken:
        raise NoPictureError(f"an item is of {given}, not of {taken}")
    try:
        if isinstance(picture, Image.Image):
            if taken != "uint8":
                raise ValueError(f"a picture of PIL is made 8 bit, where {taken} is expected; give an array or a path")
            if channels not in (1, 3):
                raise ValueError(f"{channels} channels need a uint8 tensor or array")
            check_size(*picture.size)
            return _decoded(upright(eight_bit(picture, channels), orientation(picture)))
        values = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else picture
        values = np.moveaxis(values, 0, -1) if isinstance(picture, Tensor) and values.ndim == 3 else values
        values = values[..., None] if values.ndim == 2 else values
        if taken != "uint8":
            return as_image(Stored(values.copy()), channels, pixels)
        fitting = (1, 3) if channels in (1, 3) else (channels,)
        if values.ndim != 3 or 0 in values.shape or values.shape[-1] not in fitting:
            raise ValueError(f"shape {tuple(picture.shape)}, where {channels} channels are expected")
        check_size(values.shape[1], values.shape[0])
        if values.shape[-1] == channels:
            return _tensor(values.copy())
        return _decoded(eight_bit(Image.fromarray(values[..., 0] if channels == 3 else values), channels))
    except Exception as error:  # as in read_image: PIL may decode here
        raise image_error(name, error) from None


def _decoded(image: Image.Image) -> Tensor:
    """``(C, H, W)`` uint8 of an image in mode L or RGB."""
    values = np.array(image)
    return _tensor(values[..., None] if values.ndim == 2 else values)


def read_header(source: Path | bytes, channels: int = 3, name: str = "", pixels: Pixels = AS_STORED) -> Header:
    """Format, mode and size of a file that ``read_image`` may still refuse; raises ``ImageError`` as it does."""
    try:
        data = source if isinstance(source, bytes) else read_file(source)
        if _is_array(data, channels, pixels):
            stored = _read_array(data, None if pixels.bands else channels)
            height, width, count = stored.values.shape
            return Header(_array_kind(data), f"{stored.values.dtype}x{count}", width, height, stored.pages)
        with open_picture(data) as image:
            return Header(image.format or "?", image.mode, *image.size, _pages(image))
    except Exception as error:  # as in read_image
        raise image_error(name or name_of(source), error) from None


def read_numbers(path: Path) -> NDArray[Any]:
    """The number that a file stores for each pixel, as it is: the index of a palette's colour, 8 or 16 bit.

    Returns:
        ``(H, W)`` integers.

    Raises:
        ImageError: if the file cannot be read, or holds colours or approximate numbers.
    """
    try:
        data = read_file(path)
        if _is_array(data, 1, AS_STORED):
            numbers = _read_array(data, 1).values
            numbers = numbers[..., 0] if numbers.shape[-1] == 1 else numbers
        else:
            numbers = _exact_pixels(data)
        if numbers.ndim == 3 and (numbers[..., :3] == numbers[..., :1]).all() and numbers.shape[-1] == 3:
            numbers = numbers[..., 0]  # one number, written three times
        if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
            raise ValueError(
                f"holds colours or fractions ({numbers.dtype}, {numbers.shape}), not a class number per pixel"
            )
        return numbers
    except Exception as error:  # as in read_image
        raise image_error(name_of(path), error) from None


def read_colours(path: Path) -> NDArray[np.uint8]:
    """The colour that a mask has for each pixel, exactly; a palette's index becomes its colour.

    Returns:
        ``(H, W, 3)``: red, green, blue.

    Raises:
        ImageError: if the file cannot be read, or holds approximate colours.
    """
    try:
        return _exact_pixels(read_file(path), mode="RGB")
    except Exception as error:  # as in read_image
        raise image_error(name_of(path), error) from None


def stored_type(source: Path | bytes, image: Tensor, channels: int, pixels: Pixels = AS_STORED) -> str:
    """Type of the numbers in a file that gave ``image``: ``uint16`` also where nodata has made it float32."""
    if not image.is_floating_point() or not bool(image[0].isnan().any()):
        return str(image.dtype).removeprefix("torch.")
    data = source if isinstance(source, bytes) else read_file(source)
    return pixel_type(read_stored(data, channels, pixels))


def pixel_type(stored: Stored) -> str:
    """Type that the numbers have when they are read, whatever nodata makes of some of them."""
    return as_stored(stored.values[:1, :1, :1]).dtype.name


def as_image(stored: Stored, channels: int, pixels: Pixels) -> Tensor:
    """``(C, H, W)`` in the type of the data set of what a file holds; raises ValueError as :func:`read_image` would."""
    values = with_channels(stored, channels, pixels.bands)
    nodata = [number for number in (pixels.nodata, stored.nodata) if number is not None]
    if pixels.type == "uint8" and values.dtype != np.uint8:
        return _tensor(full_scale(values))
    kind = pixel_type(stored)
    if pixels.type not in ("any", kind):
        raise ValueError(f"holds {kind}, the other files {pixels.type}; --value_range LOW,HIGH takes both as they are")
    if values.dtype == np.uint8 and not nodata:
        return _tensor(values)
    known = as_stored(values, nodata)
    if pixels.log and (known < 0).any():
        raise ValueError(f"holds {np.nanmin(known):g}, which has no logarithm; read it without --log_values")
    if known.dtype.kind == "f" and (share := float(np.isnan(known[..., 0]).mean())) > MAX_NODATA:
        raise NodataError(f"{share:.0%} of its pixels are nodata, more than the limit of {MAX_NODATA:.0%}")
    return _tensor(known)


def read_stored(data: bytes, channels: int, pixels: Pixels) -> Stored:
    """What a file holds, upright."""
    if _is_array(data, channels, pixels):
        return _read_array(data, None if pixels.bands else channels)
    return _read_picture(data, channels, pixels)


def _is_array(data: bytes, channels: int, pixels: Pixels) -> bool:
    """Whether Pillow is passed over: ``.npy``, DICOM, many channels, and TIFF of more than 8 bit."""
    many = bool(pixels.bands) or channels not in (1, 3)
    if data.startswith(TIFF_MAGIC):
        return many or not is_plain(data)
    if data.startswith(JPEG2000_MAGIC):
        return many
    return data.startswith(NPY_MAGIC) or is_dicom(data)


def _read_array(data: bytes, channels: int | None) -> Stored:
    if is_dicom(data):
        return read_dicom(data)
    if data.startswith(JPEG2000_MAGIC):
        return read_jpeg2000(data)
    return read_npy(data, channels) if data.startswith(NPY_MAGIC) else read_tiff(data, channels)


def _array_kind(data: bytes) -> str:
    if is_dicom(data):
        return "DICOM"
    return "NPY" if data.startswith(NPY_MAGIC) else "TIFF" if data.startswith(TIFF_MAGIC) else "JPEG2000"


def _read_picture(data: bytes, channels: int, pixels: Pixels) -> Stored:
    """8-bit pixels of a picture, or the numbers of a deeper one."""
    if pixels.bands:  # of red, green and blue
        return _read_picture(data, 3, Pixels(type=pixels.type))
    if channels in (1, 3) and (fast := _read_jpeg(data, channels)) is not None:
        return Stored(fast)
    with open_picture(data) as image:
        if channels not in (1, 3):
            raise ChannelsError(1 if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;") else 3, channels)
        if pixels.type != "uint8" and (wide := read_wide_picture(data, image)) is not None:
            return wide._replace(values=turned(wide.values, orientation(image)))
        image.load()
        refuse_missing_rows(image, data)
        decoded = np.array(upright(eight_bit(image, channels), orientation(image)))
        return Stored(decoded[..., None] if decoded.ndim == 2 else decoded)


def _read_jpeg(data: bytes, channels: int) -> NDArray[np.uint8] | None:
    """``(H, W, C)`` uint8 of a JPEG in grey or colour, bit for bit what Pillow gives; None for all other files.

    Raises:
        ValueError: if the decoder warns. Of 1,200 files with one flipped bit it warned of 242; in half of these more
            than 45 % of the pixels were wrong. Of 500 good photos it warned of none.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError:
        return None
    if space not in ("YCbCr", "RGB", "Gray"):
        return None
    check_size(width, height, AS_TILES)
    try:
        values = simplejpeg.decode_jpeg(data, "GRAY" if space == "Gray" else "RGB", strict=True)
    except ValueError as error:
        if str(error).startswith(("Corrupt", "Premature")):
            raise
        return None  # of a kind that this library does not decode: Pillow is asked
    if any(mark in data for mark in (b"Exif\0", b"http://ns.adobe.com/xap/")):
        with open_picture(data) as image:
            values = turned(values, orientation(image))
    if values.shape[2] == 1 and channels == 3:
        values = np.repeat(values, 3, axis=2)
    elif values.shape[2] == 3 and channels == 1:
        values = np.asarray(Image.fromarray(values).convert("L"))[..., None]
    decoded: NDArray[np.uint8] = values
    return decoded


def _tensor(values: NDArray[Any]) -> Tensor:
    """``(C, H, W)`` of ``(H, W, C)``; a view where the memory is our own and torch can take it."""
    owned = values if all(stride > 0 for stride in values.strides) and values.flags.writeable else values.copy()
    return torch.from_numpy(owned).permute(2, 0, 1)


def _exact_pixels(data: bytes, mode: str | None = None) -> NDArray[Any]:
    with open_picture(data) as image:
        if image.format == "JPEG":
            raise ValueError("a JPEG changes numbers; write masks as PNG")
        image.load()
        refuse_missing_rows(image, data)
        return np.asarray(image.convert(mode) if mode else image)


def _pages(image: Image.Image) -> int:
    """Pictures in the file, 1 if its metadata are broken."""
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a parser of random bytes
        return 1

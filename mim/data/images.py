"""The one reader of image files: legal pictures become right uint8 pixels, everything else one ``ImageError``.

Files are hostile until read. Only ordinary files are opened, only decoders of the formats below are tried, the header's
size is checked before anything is decoded, and a picture is decoded once: Pillow's second attempt at a broken file
succeeds silently. What becomes of unusual pixels:

- 16-bit integers are divided by 257. Wider and signed integers take the narrowest full scale of 255, 65535 or their own
  type's that holds the picture's largest value, floats that of 1, 255 or 65535; negative values become 0.
- Transparent pixels are laid over white. Palettes, CMYK, YCbCr and Lab become RGB; colour profiles are ignored.
- The EXIF orientation is applied. Animations and stacks give their first picture.

Not detected, because the decoders do not tell: damage inside a JPEG's entropy-coded data that still decodes.
"""

import logging
import stat
import struct
import warnings
import zlib
from io import BytesIO
from itertools import islice
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from mim.errors import printable

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
"""Pillow decoders in use (``.npy`` has our own); none starts a program or follows references. JPEG covers MPO."""
SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "bmp", "tif", "tiff", "gif", "avif", "npy"),
    *("ppm", "pgm", "pbm", "pnm", "pfm", "jp2", "j2k", "j2c", "jpx", "jpf"),
)
"""File name endings of images, lower case; folders and tar shards are searched for these."""
MAX_FILE_BYTES = 1 << 28
"""256 MiB: larger files are refused unread."""
MAX_PIXELS = 89_478_485
"""Decoded pixels, 256 MiB as RGB: the size above which Pillow itself warns of a decompression bomb."""
MAX_ARRAY_BYTES = 1 << 29
"""512 MiB: decoded size of a TIFF of many channels."""
MAX_ASPECT = 200
"""Longer side over shorter side: resizing a 1x4096 picture by its shorter side takes half a minute."""

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PHOTOMETRIC, _SAMPLE_FORMAT = 262, 339  # TIFF tags; no SampleFormat means unsigned
_NPY_MAGIC = b"\x93NUMPY"
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# x0, y0, dx, dy of the seven Adam7 passes (PNG specification, section 8.2).
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))

# Pillow warns of odd metadata once per file; what the user can act on is an ImageError.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class ImageError(Exception):
    """A file that is not a readable image.

    Args:
        path: the file, as messages show it.
        reason: why, in one short line.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        """One line: the path, then the reason."""
        return f"{printable(self.path)}: {self.reason}"


class NoPictureError(TypeError):
    """An object that is no picture of any kind, so that the next one will hardly be one."""


class Header(NamedTuple):
    """What a file says about itself before it is decoded."""

    format: str
    mode: str
    width: int
    height: int


def read_image(source: Path | bytes, channels: int = 3, name: str = "") -> Tensor:
    """The picture in a file as uint8 pixels.

    Args:
        source: the file, or its content.
        channels: 1 and 3 convert between grey and colour; other counts need a TIFF or ``.npy`` file of exactly as many.
        name: what messages call ``source``; by default its path.

    Returns:
        ``(C, H, W)`` uint8, upright.

    Raises:
        ImageError: if the file cannot be read, or only in part.
    """
    name = name or _printable(source)
    try:
        data = source if isinstance(source, bytes) else _read_file(source)
        if _is_array(data, channels):
            return _to_tensor(_read_array(data, channels), channels)
        with _open(data) as image:
            image.load()
            _refuse_missing_rows(image, data)
            pixels: Tensor = pil_to_tensor(_upright(_eight_bit(image, channels), _orientation(image)))
            return pixels
    except Exception as error:  # a decoder of random bytes may raise anything: struct.error, TokenError, RuntimeError
        raise ImageError(name, _reason(error)) from None


def read_picture(picture: object, channels: int = 3, name: str = "image") -> Tensor:
    """A picture that is in memory already, or a file, as uint8 pixels.

    Args:
        picture: an image of PIL, a uint8 tensor ``(C, H, W)`` or ``(H, W)``, a uint8 array ``(H, W, C)`` or ``(H, W)``,
            a path, or the content of a file.
        channels: as in :func:`read_image`.
        name: what messages call it.

    Returns:
        ``(C, H, W)`` uint8, upright; shares no memory with ``picture``.

    Raises:
        NoPictureError: for what is none of these.
        ImageError: as in :func:`read_image`.
    """
    if isinstance(picture, str | Path | bytes):
        return read_image(Path(picture) if isinstance(picture, str) else picture, channels, name)
    if not isinstance(picture, Image.Image | Tensor | np.ndarray):
        raise NoPictureError(f"an item is a {type(picture).__name__}, not a picture")
    if not isinstance(picture, Image.Image) and picture.dtype not in (torch.uint8, np.dtype(np.uint8)):
        raise NoPictureError(f"an item is of {str(picture.dtype).removeprefix('torch.')}, not of uint8")
    try:
        if isinstance(picture, Image.Image):
            if channels not in (1, 3):
                raise ValueError(f"{channels} channels need a uint8 tensor or array")
            _check_size(*picture.size)
            return pil_to_tensor(_upright(_eight_bit(picture, channels), _orientation(picture)))  # type: ignore[no-any-return]
        values = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else picture
        values = np.moveaxis(values, 0, -1) if isinstance(picture, Tensor) and values.ndim == 3 else values
        values = values[..., None] if values.ndim == 2 else values
        fitting = (1, 3) if channels in (1, 3) else (channels,)
        if values.ndim != 3 or 0 in values.shape or values.shape[-1] not in fitting:
            raise ValueError(f"shape {tuple(picture.shape)}, where {channels} channels are expected")
        _check_size(values.shape[1], values.shape[0])
        return _to_tensor(values, channels)
    except Exception as error:  # as in read_image: PIL may decode here
        raise ImageError(name, _reason(error)) from None


def read_header(source: Path | bytes, channels: int = 3, name: str = "") -> Header:
    """Format, mode and size of a file that ``read_image`` may still refuse; raises ``ImageError`` as it does."""
    try:
        data = source if isinstance(source, bytes) else _read_file(source)
        if _is_array(data, channels):
            values = _read_array(data, channels)
            height, width, count = values.shape
            return Header("NPY" if data.startswith(_NPY_MAGIC) else "TIFF", f"{values.dtype}x{count}", width, height)
        with _open(data) as image:
            return Header(image.format or "?", image.mode, *image.size)
    except Exception as error:  # as in read_image
        raise ImageError(name or _printable(source), _reason(error)) from None


def read_numbers(path: Path) -> NDArray[Any]:
    """The number that a file stores for each pixel, as it is: the index of a palette's colour, 8 or 16 bit.

    Returns:
        ``(H, W)`` integers.

    Raises:
        ImageError: if the file cannot be read, or holds colours or approximate numbers.
    """
    try:
        data = _read_file(path)
        if _is_array(data, 1):
            numbers = _read_array(data, 1)
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
        raise ImageError(_printable(path), _reason(error)) from None


def read_colours(path: Path) -> NDArray[np.uint8]:
    """The colour that a mask has for each pixel, exactly; a palette's index becomes its colour.

    Returns:
        ``(H, W, 3)``: red, green, blue.

    Raises:
        ImageError: if the file cannot be read, or holds approximate colours.
    """
    try:
        return _exact_pixels(_read_file(path), mode="RGB")
    except Exception as error:  # as in read_image
        raise ImageError(_printable(path), _reason(error)) from None


def _exact_pixels(data: bytes, mode: str | None = None) -> NDArray[Any]:
    with _open(data) as image:
        if image.format == "JPEG":
            raise ValueError("a JPEG changes numbers; write masks as PNG")
        image.load()
        _refuse_missing_rows(image, data)
        return np.asarray(image.convert(mode) if mode else image)


def _read_file(path: Path) -> bytes:
    status = path.stat()  # before opening: a named pipe would wait for a writer for ever
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "named pipe", stat.S_IFDIR: "folder", stat.S_IFSOCK: "socket"}
        raise ValueError(f"not an ordinary file but a {kinds.get(stat.S_IFMT(status.st_mode), 'device')}")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"{status.st_size >> 20} MiB, more than the limit of {MAX_FILE_BYTES >> 20} MiB")
    return path.read_bytes()


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = printable(text.partition("\n")[0])[:200]
    told = isinstance(error, OSError | ValueError | SyntaxError | Image.DecompressionBombError)
    return text if told and text else f"damaged file ({type(error).__name__}: {text})"


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, more than the limit of {MAX_PIXELS / 1e6:.0f} million")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width}x{height} pixels, longer than {MAX_ASPECT}:1")


# Pictures ------------------------------------------------------------------------------------------------------------


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("empty file")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"damaged, or not of a readable format (starts with {data[:16]!r})") from None
    _check_size(*image.size)
    if image.format == "PNG":  # Pillow decodes over wrong checksums unless asked
        Image.open(BytesIO(data), formats=FORMATS).verify()
    return image


def _eight_bit(image: Image.Image, channels: int) -> Image.Image:
    """Mode L for one channel, RGB for three."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values, tags = np.asarray(image), getattr(image, "tag_v2", None)
        # Pillow keeps unsigned 32-bit samples of a TIFF in a signed type, and a picture in which 0 is white as it is.
        if tags is not None and image.mode == "I" and tags.get(_SAMPLE_FORMAT, (1,)) == (1,):
            values = values.view(np.uint32)
        white_is_zero = tags is not None and tags.get(_PHOTOMETRIC) == 0
        image = Image.fromarray(_full_scale(values) ^ np.uint8(255 * white_is_zero))
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    elif image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB") or image
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of a decoded image, 1 (upright) if there is none or the metadata is broken."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a parser of random bytes too
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _refuse_missing_rows(image: Image.Image, data: bytes) -> None:
    """Pillow leaves rows that a PNG lacks black; a full count is made only if the last two rows are."""
    if image.format != "PNG" or np.asarray(image.crop((0, max(0, image.height - 2), *image.size))).any():
        return
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    expected = 0
    for x, y, dx, dy in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = ceil((width - x) / dx), ceil((height - y) / dy)
        expected += rows * (1 + ceil(columns * bits / 8)) if columns > 0 and rows > 0 else 0
    if _inflated_bytes(data, expected) < expected:
        raise ValueError("image file is truncated: rows are missing")


def _inflated_bytes(data: bytes, enough: int) -> int:
    """Bytes in a PNG's image data, counted up to ``enough`` a megabyte at a time."""
    inflate, count, position = zlib.decompressobj(), 0, 8
    while position + 8 <= len(data) and count < enough:
        length, kind = struct.unpack_from(">I4s", data, position)
        pending = data[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        while pending and count < enough:
            count += len(inflate.decompress(pending, 1 << 20))
            pending = inflate.unconsumed_tail
        position += 12 + length
    return count


# Arrays --------------------------------------------------------------------------------------------------------------


def _is_array(data: bytes, channels: int) -> bool:
    """Whether Pillow is passed over: ``.npy``, TIFF of many channels, and TIFF layouts that Pillow does not know."""
    if data.startswith(_NPY_MAGIC):
        return True
    if not data.startswith(_TIFF_MAGIC):
        if channels not in (1, 3):
            raise ValueError(f"{channels} channels need a TIFF or .npy file")
        return False
    if channels not in (1, 3):
        return True
    try:
        Image.open(BytesIO(data), formats=("TIFF",)).close()
    except UnidentifiedImageError:
        return True
    return False


def _read_array(data: bytes, channels: int) -> NDArray[Any]:
    """``(H, W, C)`` numbers of any type from an array with its channels last or first, or with none."""
    values = _read_npy(data, channels) if data.startswith(_NPY_MAGIC) else _read_tiff(data, channels)
    return values[..., None] if values.ndim == 2 else np.moveaxis(values, _channel_axis(values.shape, channels), -1)


def _read_npy(data: bytes, channels: int) -> NDArray[Any]:
    file = BytesIO(data)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = readers[version](file)
    _check_array(shape, dtype, channels)
    # A view of the bytes at hand: no pickles, and a header cannot make us allocate what the file does not hold.
    values = np.frombuffer(data, dtype, prod(shape), file.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def _read_tiff(data: bytes, channels: int) -> NDArray[Any]:
    import tifffile  # 0.1 s, and few need it

    with tifffile.TiffFile(BytesIO(data)) as file:
        # Never the whole chain of pages: in a damaged file it may be a ring.
        pages = list(islice(file.pages, channels + 1))
        # Channels may be pages; otherwise the first page is the picture.
        pages = pages if len(pages[0].shape) == 2 and channels not in (1, 3) else pages[:1]
        shape = (len(pages), *pages[0].shape) if len(pages) > 1 else pages[0].shape
        if any(page.shape != pages[0].shape for page in pages):
            raise ValueError("pages of different shapes")
        _check_array(shape, pages[0].dtype, channels)
        return np.stack([page.asarray() for page in pages]).reshape(shape)


def _channel_axis(shape: tuple[int, ...], channels: int) -> int:
    """Axis of the channels in a shape of three, last or first."""
    # Grey and colour stand in for each other; any other count must be met exactly.
    for count in (channels, 3, 1) if channels in (1, 3) else (channels,):
        for axis in (2, 0):
            if shape[axis] == count:
                return axis
    raise ValueError(f"an array of shape {shape}, where {channels} channels are expected")


def _check_array(shape: tuple[int, ...], dtype: np.dtype[Any] | None, channels: int) -> None:
    if dtype is None or dtype.kind not in "buif":
        raise ValueError(f"an array of {dtype}, not of numbers")
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"an array of shape {shape}, not of an image")
    if len(shape) == 2 and channels not in (1, 3):
        raise ValueError(f"an array of shape {shape}, where {channels} channels are expected")
    axis = _channel_axis(shape, channels) if len(shape) == 3 else 2
    height, width = shape[:axis] + shape[axis + 1 :]
    _check_size(width, height)
    if prod(shape) * dtype.itemsize > MAX_ARRAY_BYTES:
        raise ValueError(f"an array of {prod(shape) * dtype.itemsize >> 20} MiB")


def _to_tensor(values: NDArray[Any], channels: int) -> Tensor:
    """``(C, H, W)`` uint8 from ``(H, W, C)`` numbers."""
    pixels = _full_scale(values)
    if pixels.shape[-1] == channels:
        return torch.from_numpy(np.moveaxis(pixels, -1, 0))
    image = Image.fromarray(pixels[..., 0] if channels == 3 else pixels)
    converted: Tensor = pil_to_tensor(_eight_bit(image, channels))
    return converted


def _full_scale(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Numbers of any type as uint8 of their own memory; the module's docstring says how they are scaled."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values.copy()
    if kind == "f" and not np.isfinite(values).all():
        raise ValueError("holds NaN or infinite values")
    if kind == "b" or values.dtype == np.uint16:
        tops = [1 if kind == "b" else 65535]
    else:
        tops = [1, 255, 65535] if kind == "f" else [255, 65535, int(np.iinfo(values.dtype).max)]
    largest = values.max().item()  # exact in any type, and nothing overflows when it is compared
    top = next((top for top in tops if largest <= top), None)
    if top is None:
        raise ValueError(f"holds values up to {largest:g}; floats must lie in 0..1, 0..255 or 0..65535")
    # Single precision keeps 24 bits, enough for 8; doubles would double the memory of large pictures.
    scaled = np.maximum(values, 0).astype(np.float32) * np.float32(255 / top)
    return np.asarray((scaled + 0.5).astype(np.uint8))


def _printable(source: Path | bytes) -> str:
    return "image" if isinstance(source, bytes) else printable(str(source))

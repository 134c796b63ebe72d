"""Pictures that Pillow decodes: refused from their header if too large, decoded once, upright, 8 bit per channel.

Only decoders of the formats below are tried. What becomes of unusual pixels: transparent ones are laid over white;
palettes, CMYK, YCbCr and Lab become RGB; colour profiles are ignored. The EXIF orientation is applied. Animations and
stacks give their first picture.
"""

import logging
import struct
import warnings
import zlib
from io import BytesIO
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from mim.data.files import AS_TILES, MAX_PIXELS, check_size

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
"""Pillow decoders in use (``.npy`` has our own); none starts a program or follows references. JPEG covers MPO."""
_PHOTOMETRIC, _SAMPLE_FORMAT = 262, 339  # TIFF tags; no SampleFormat means unsigned
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
for library in ("PIL", "tifffile"):
    logging.getLogger(library).setLevel(logging.CRITICAL)


def open_picture(data: bytes) -> Image.Image:
    """The picture, not yet decoded."""
    if not data:
        raise ValueError("empty file")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"damaged, or not of a readable format (starts with {data[:16]!r})") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more than the limit of {MAX_PIXELS / 1e6:.0f} million pixels; {AS_TILES}") from None
    check_size(*image.size, AS_TILES)
    if image.format == "PNG":  # Pillow decodes over wrong checksums unless asked
        Image.open(BytesIO(data), formats=FORMATS).verify()
    return image


def eight_bit(image: Image.Image, channels: int) -> Image.Image:
    """Mode L for one channel, RGB for three."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values, tags = np.asarray(image), getattr(image, "tag_v2", None)
        # Pillow keeps unsigned 32-bit samples of a TIFF in a signed type, and a picture in which 0 is white as it is.
        if tags is not None and image.mode == "I" and tags.get(_SAMPLE_FORMAT, (1,)) == (1,):
            values = values.view(np.uint32)
        white_is_zero = tags is not None and tags.get(_PHOTOMETRIC) == 0
        image = Image.fromarray(full_scale(values) ^ np.uint8(255 * white_is_zero))
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    elif image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB") or image
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def orientation(image: Image.Image) -> int:
    """EXIF orientation of a decoded image, 1 (upright) if there is none or the metadata is broken."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a parser of random bytes too
        return 1


def upright(image: Image.Image, turn: int) -> Image.Image:
    """The image after the turn that its orientation stands for."""
    return image.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else image


def refuse_missing_rows(image: Image.Image, data: bytes) -> None:
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


def full_scale(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Numbers of any type as uint8 of their own memory, scaled by a guess from this picture alone.

    16-bit integers are divided by 257. Wider and signed integers take the narrowest full scale of 255, 65535 or their
    own type's that holds the picture's largest value, floats that of 1, 255 or 65535; negative values become 0.
    """
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

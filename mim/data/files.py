"""Image files before they are decoded: which are opened, what is refused of them, and how they are named."""

import stat
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mim.errors import printable

SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "bmp", "tif", "tiff", "gif", "avif", "npy"),
    *("ppm", "pgm", "pbm", "pnm", "pfm", "jp2", "j2k", "j2c", "jpx", "jpf"),
    *(("dcm", "dicom", "ima") if find_spec("pydicom") else ()),
)
"""File name endings of images, lower case; folders and tar shards are searched for these."""
MEDICAL = "pip install 'mim-suite[medical]'"
"""What makes DICOM be read."""
MAX_FILE_BYTES = 1 << 28
"""256 MiB: larger files are refused unread."""
MAX_PIXELS = 89_478_485
"""Decoded pixels, 256 MiB as RGB: the size above which Pillow itself warns of a decompression bomb."""
MAX_ARRAY_BYTES = 1 << 29
"""512 MiB: decoded size of a TIFF of many channels."""
IN_PARTS = "--windows 512 of pretrain and check_data reads it in parts"
"""What to do about an image that is too large."""
AS_TILES = f"as a TIFF in tiles, {IN_PARTS}"
"""The same about one that only a decoder of whole pictures reads."""
MAX_ASPECT = 200
"""Longer side over shorter side: resizing a 1x4096 picture by its shorter side takes half a minute."""


class ImageError(Exception):
    """A file that is not a readable image.

    Args:
        path: the file, as messages show it.
        reason: why, in one short line.
        channels: how many it has, if that is what is wrong with it.
    """

    def __init__(self, path: str, reason: str, channels: int | None = None) -> None:
        super().__init__(path, reason, channels)
        self.path, self.reason, self.channels = path, reason, channels

    def __str__(self) -> str:
        """One line: the path, then the reason."""
        return f"{printable(self.path)}: {self.reason}"


class UnmeasuredError(ImageError):
    """A part of an image in which next to nothing was measured: passed over, and not called unreadable."""


class NothingReadableError(RuntimeError):
    """So much cannot be read that it is hardly the images."""


class NodataError(ValueError):
    """Next to nothing was measured."""


class ChannelsError(ValueError):
    """An image with other channels than those asked for.

    Args:
        found: how many it has.
        expected: how many are asked for.
    """

    def __init__(self, found: int, expected: int) -> None:
        super().__init__(f"{found} channel{'s' * (found != 1)}, where {expected} channels are expected")
        self.found = found


class Header(NamedTuple):
    """What a file says about itself before it is decoded."""

    format: str
    mode: str
    width: int
    height: int
    pages: int = 1


def read_file(path: Path) -> bytes:
    """The content of an ordinary file of bearable size."""
    size = check_ordinary(path)
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size >> 20} MiB, more than the limit of {MAX_FILE_BYTES >> 20} MiB; {IN_PARTS}")
    return path.read_bytes()


def check_ordinary(path: Path) -> int:
    """Bytes of an ordinary file; refuses whatever else may be called like one."""
    status = path.stat()  # before opening: a named pipe would wait for a writer for ever
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "named pipe", stat.S_IFDIR: "folder", stat.S_IFSOCK: "socket"}
        raise ValueError(f"not an ordinary file but a {kinds.get(stat.S_IFMT(status.st_mode), 'device')}")
    return status.st_size


def image_error(name: str, error: BaseException) -> ImageError:
    """What is told of a decoder's error."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = printable(text.partition("\n")[0])[:200]
    told = isinstance(error, OSError | ValueError | SyntaxError | Image.DecompressionBombError)
    reason = text if told and text else f"damaged file ({type(error).__name__}: {text})"
    return ImageError(name, reason, error.found if isinstance(error, ChannelsError) else None)


def name_of(source: Path | bytes) -> str:
    """What messages call a source that has no other name."""
    return "image" if isinstance(source, bytes) else printable(str(source))


def check_size(width: int, height: int, remedy: str = IN_PARTS) -> None:
    """Refuses pictures that are too large or too long."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, more than the limit of {MAX_PIXELS / 1e6:.0f} million; {remedy}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width}x{height} pixels, longer than {MAX_ASPECT}:1")

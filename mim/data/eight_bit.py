"""Pictures of any type scaled to 8 bit file by file: how runs read that were begun before the scale was the data's.

Their settings have no ``value_range``, or say ``per_file``. They resume with the pixels, and the mistakes, of then.
"""

from io import BytesIO
from itertools import islice
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from mim.data.arrays import NPY_MAGIC, TIFF_MAGIC
from mim.data.files import MAX_ARRAY_BYTES, check_size
from mim.data.pictures import eight_bit, full_scale, open_picture, orientation, refuse_missing_rows, upright


def read_eight_bit(data: bytes, channels: int) -> Tensor:
    """``(C, H, W)`` uint8, upright; raises whatever a decoder raises."""
    if _is_array(data, channels):
        return _to_tensor(_read_array(data, channels), channels)
    with open_picture(data) as image:
        image.load()
        refuse_missing_rows(image, data)
        pixels: Tensor = pil_to_tensor(upright(eight_bit(image, channels), orientation(image)))
        return pixels


def _is_array(data: bytes, channels: int) -> bool:
    """Whether Pillow is passed over: ``.npy``, TIFF of many channels, and TIFF layouts that Pillow does not know."""
    if data.startswith(NPY_MAGIC):
        return True
    if not data.startswith(TIFF_MAGIC):
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
    values = _read_npy(data, channels) if data.startswith(NPY_MAGIC) else _read_tiff(data, channels)
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
    check_size(width, height)
    if prod(shape) * dtype.itemsize > MAX_ARRAY_BYTES:
        raise ValueError(f"an array of {prod(shape) * dtype.itemsize >> 20} MiB")


def _to_tensor(values: NDArray[Any], channels: int) -> Tensor:
    """``(C, H, W)`` uint8 from ``(H, W, C)`` numbers."""
    pixels = full_scale(values)
    if pixels.shape[-1] == channels:
        return torch.from_numpy(np.moveaxis(pixels, -1, 0))
    image = Image.fromarray(pixels[..., 0] if channels == 3 else pixels)
    converted: Tensor = pil_to_tensor(eight_bit(image, channels))
    return converted

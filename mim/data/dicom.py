"""DICOM files through pydicom: the numbers of the modality, such as Hounsfield units; no window is applied."""

import logging
import warnings
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mim.data.arrays import Stored, check_array
from mim.data.files import AS_TILES, MEDICAL, check_size

if TYPE_CHECKING:
    from pydicom import Dataset

_DEFLATED = b"1.2.840.10008.1.2.1.99"  # the whole file is one compressed stream, which pydicom unpacks unmeasured
_CODECS = {  # transfer syntaxes that imagecodecs decodes; pydicom has packages of its own for each
    **dict.fromkeys(("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"), "ljpeg"),
    **dict.fromkeys(("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"), "jpegls"),
    **dict.fromkeys(("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"), "jpeg2k"),
}


def is_dicom(data: bytes) -> bool:
    """Whether a file begins like DICOM."""
    return data[128:132] == b"DICM"


def read_dicom(data: bytes) -> Stored:
    """The first frame; float32 if the file has slope and intercept, be they 1 and 0, or a table, as stored if not.

    Raises:
        ValueError: for what holds no image, a palette, or a stream that is compressed as a whole; without the package.
    """
    try:
        from pydicom import dcmread
        from pydicom.pixels import apply_modality_lut
    except ImportError:
        raise ValueError(f"DICOM needs a package: {MEDICAL}") from None

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    if _DEFLATED in data[:1024]:
        raise ValueError("a DICOM file that is deflated as a whole; unpack it with dcmconv +te")
    with warnings.catch_warnings(action="ignore"):  # of odd metadata
        file = dcmread(BytesIO(data))
        values, frames = _samples(file)
        rescaled = any(name in file for name in ("RescaleSlope", "ModalityLUTSequence"))
        padding = _padding(file, values)
        if rescaled:
            values = np.asarray(apply_modality_lut(values, file), np.float32)
            padding = None if padding is None else np.asarray(apply_modality_lut(padding, file), np.float32)
    nodata = None if padding is None else float(padding.item())
    return Stored(values, nodata, colours=values.shape[2] == 3, pages=frames)


def _samples(file: "Dataset") -> tuple[NDArray[Any], int]:
    """``(H, W, C)`` as stored, with 0 for black, and the number of frames."""
    if "PixelData" not in file:
        raise ValueError("a DICOM file without an image")
    kind, samples = file.PhotometricInterpretation, int(file.SamplesPerPixel)
    frames = int(file.get("NumberOfFrames") or 1)
    if kind == "PALETTE COLOR":
        raise ValueError("a DICOM file with a palette; write it as PNG")
    check_size(file.Columns, file.Rows, AS_TILES)
    check_array((file.Rows, file.Columns, samples), np.dtype(f"u{max(1, file.BitsAllocated // 8)}"))
    values = _first_frame(file, frames).reshape(file.Rows, file.Columns, samples)
    if kind == "MONOCHROME1":  # white is 0
        low, high = _limits(file)
        values = (low + high - values.astype(np.int64)).astype(values.dtype)
    return values, frames


def _first_frame(file: "Dataset", frames: int) -> NDArray[Any]:
    from pydicom.encaps import get_frame
    from pydicom.pixels import pixel_array

    codec = _CODECS.get(file.file_meta.TransferSyntaxUID)
    if codec is None or file.SamplesPerPixel != 1:
        return np.asarray(pixel_array(file, index=0))
    import imagecodecs

    encoded = get_frame(file.PixelData, 0, number_of_frames=frames)
    values: NDArray[Any] = getattr(imagecodecs, f"{codec}_decode")(encoded)
    if file.PixelRepresentation == 1 and values.dtype.kind == "u":  # the sign bit is the highest of those that count
        spare = 8 * values.dtype.itemsize - file.BitsStored
        values = (values << spare).view(f"i{values.dtype.itemsize}") >> spare
    return values


def _padding(file: "Dataset", values: NDArray[Any]) -> NDArray[Any] | None:
    """The number for pixels outside of the measurement ``(1, 1, 1)``, which a whole range of numbers becomes."""
    if "PixelPaddingValue" not in file or values.shape[2] != 1:
        return None
    ends = np.array([file.PixelPaddingValue, file.get("PixelPaddingRangeLimit", file.PixelPaddingValue)], np.int64)
    if file.PhotometricInterpretation == "MONOCHROME1":
        ends = sum(_limits(file)) - ends
    value, end = ends.astype(values.dtype)  # some write -2000 as 63536
    values[(values >= min(value, end)) & (values <= max(value, end))] = value
    return np.full((1, 1, 1), value)


def _limits(file: "Dataset") -> tuple[int, int]:
    """Smallest and largest number that a sample can be."""
    span = 1 << file.BitsStored
    return (-span // 2, span // 2 - 1) if file.PixelRepresentation == 1 else (0, span - 1)

"""DICOM files, against what pydicom, imagecodecs and numpy put into them."""

import io
import subprocess
import sys

import imagecodecs
import numpy as np
import pytest
import torch

from mim.data.images import ImageError, read_header, read_image
from mim.data.pixels import Pixels
from mim.data.pretrain import PretrainData
from mim.errors import UserError

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.uid import (  # noqa: E402
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

NATIVE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless)
CODECS = {
    JPEG2000Lossless: lambda a: imagecodecs.jpeg2k_encode(a, level=0, reversible=True, bitspersample=12),
    JPEGLSLossless: imagecodecs.jpegls_encode,
    JPEGLosslessSV1: lambda a: imagecodecs.ljpeg_encode(a, bitspersample=16),
}


def scan(kind="uint16", height=24, width=40):
    """``(H, W)`` of 12 bits."""
    values = np.random.default_rng(0).integers(0, 4096, (height, width))
    return (values - 2048 if kind == "int16" else values).astype(kind)


def dicom(stored, syntax=ExplicitVRLittleEndian, photometric="MONOCHROME2", bits=12, frames=None, **tags):
    """A file of ``stored``, ``(H, W)``, ``(H, W, 3)``, or of as many ``frames``."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    picture = stored[0] if frames else stored
    dataset.Rows, dataset.Columns = picture.shape[:2]
    dataset.SamplesPerPixel = 3 if picture.ndim == 3 else 1
    if picture.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = 8 * stored.dtype.itemsize
    dataset.BitsStored = min(bits, dataset.BitsAllocated)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    if frames:
        dataset.NumberOfFrames = frames
    for name, value in tags.items():
        setattr(dataset, name, value)
    if syntax in CODECS:
        unsigned = (
            stored.view(f"u{stored.dtype.itemsize}") & ((1 << bits) - 1) if syntax != JPEG2000Lossless else stored
        )
        dataset.PixelData = encapsulate([CODECS[syntax](unsigned)])
        dataset["PixelData"].VR = "OB"
    else:
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        dataset.PixelData = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
        dataset["PixelData"].VR = "OW" if stored.dtype.itemsize == 2 else "OB"
    if syntax == RLELossless:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.compress(RLELossless)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16"])
@pytest.mark.parametrize("syntax", NATIVE, ids=lambda uid: uid.keyword)
def test_numbers_without_a_rescale_arrive_as_they_are_stored(kind, syntax):
    stored = scan(kind) if kind != "uint8" else (scan() >> 4).astype(np.uint8)
    image = read_image(dicom(stored, syntax), 1)
    assert str(image.dtype) == f"torch.{kind}"
    assert np.array_equal(image[0].numpy(), stored)


@pytest.mark.parametrize("kind", ["uint16", "int16"])
@pytest.mark.parametrize("syntax", CODECS, ids=lambda uid: uid.keyword)
def test_compressed_numbers_are_those_that_were_compressed(kind, syntax):
    stored = scan(kind)
    assert np.array_equal(read_image(dicom(stored, syntax), 1)[0].numpy(), stored)


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (1, 0), (0.5, 10)])
def test_slope_and_intercept_are_applied_and_the_window_is_not(slope, intercept):
    stored = scan()
    data = dicom(stored, RescaleSlope=slope, RescaleIntercept=intercept, WindowCenter=40, WindowWidth=80)
    image = read_image(data, 1)
    assert image.dtype == torch.float32  # the same for all files of a series, whatever their slopes
    assert np.array_equal(image[0].numpy(), (stored.astype(float) * slope + intercept).astype(np.float32))


def test_of_several_frames_the_first_is_read_and_all_are_counted():
    stored = np.stack([scan(), scan() // 2, scan() // 3])
    data = dicom(stored, frames=3)
    assert np.array_equal(read_image(data, 1)[0].numpy(), stored[0])
    assert read_header(data, 1)[:5] == ("DICOM", "uint16x1", 40, 24, 3)


def test_white_is_the_largest_number_whatever_stands_for_it():
    stored = scan()
    assert np.array_equal(read_image(dicom(stored, photometric="MONOCHROME1"), 1)[0].numpy(), np.uint16(4095) - stored)
    signed = scan("int16")
    assert np.array_equal(read_image(dicom(signed, photometric="MONOCHROME1"), 1)[0].numpy(), -1 - signed)


def test_colours_are_red_green_and_blue():
    stored = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    image = read_image(dicom(stored, photometric="RGB", bits=8), 3)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), stored)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("rescale", [{}, {"RescaleSlope": 2, "RescaleIntercept": -7}])
def test_pixels_outside_of_the_measurement_are_nodata(photometric, rescale):
    stored = scan("int16")
    stored[:3] = -2000
    stored[3:5] = -1990
    padding = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1980}
    image = read_image(dicom(stored, photometric=photometric, **padding, **rescale), 1, pixels=Pixels(type="any"))[0]
    padded = (stored >= -2000) & (stored <= -1980)
    assert np.array_equal(image.isnan().numpy(), padded)
    turned = -1 - stored if photometric == "MONOCHROME1" else stored
    expected = turned * rescale["RescaleSlope"] + rescale["RescaleIntercept"] if rescale else turned
    assert np.array_equal(image.numpy()[~padded], expected[~padded].astype(np.float32))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (dicom(scan(), DeflatedExplicitVRLittleEndian), "deflated as a whole"),
        (dicom(scan(), photometric="PALETTE COLOR"), "a palette"),
        (dicom(scan(), Rows=60000, Columns=60000), "more than the limit"),
        (dicom(scan())[:1200], r"bytes|length|without an image"),
        (bytes(128) + b"DICM" + bytes(range(200)), "without an image"),
    ],
)
def test_what_is_no_image_is_refused(data, told):
    with pytest.raises(ImageError, match=told):
        read_image(data, 1)


def test_without_the_package_a_folder_says_how_to_install_it(tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom(scan()))
    program = (
        "import sys; sys.modules['pydicom'] = None\n"
        f"from mim.data.places import check_place\ncheck_place({str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "found .dcm 1; DICOM is not read" in done.stderr
    assert "pip install 'mim-suite[medical]'" in done.stderr


def test_windows_refuse_dicom_by_name(tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom(scan()))
    with pytest.raises(UserError, match="a DICOM file, which is not cut into windows"):
        PretrainData(str(tmp_path), windows=16).open((16, 16), 1, 0)

import io
import os
import pickle
import struct
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import tifffile
import torch
from hostile import Case, bad, colour, encode, exif, legal, npy, tiff
from PIL import Image

from mim.data.images import MAX_FILE_BYTES, ImageError, read_header, read_image
from mim.data.pixels import EIGHT_BIT, Pixels

BAD = list(bad())
MEASUREMENTS = {"nan.tif", "nan.npy", "infinite.npy", "huge-values.npy"}  # bad pictures, but legal numbers


def pixels(source, channels=3, form=EIGHT_BIT):
    return read_image(source, channels, pixels=form).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("case", legal(), ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["uint8", "per_file"])
def test_a_legal_file_gives_the_right_pixels_among_pictures(case: Case, kind):
    difference = np.abs(pixels(case.data, form=Pixels(type=kind)).astype(int) - case.truth)
    assert difference.max() <= case.tolerance


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["uint8", "per_file", "any"])
def test_a_bad_file_is_refused_with_its_name_and_a_reason(case: Case, kind):
    if kind == "any" and case.name in MEASUREMENTS:
        assert read_image(case.data, pixels=Pixels(type=kind)).dtype == torch.float32
        return
    with pytest.raises(ImageError) as refusal:
        read_image(case.data, name=case.name, pixels=Pixels(type=kind))
    assert refusal.value.path == case.name
    assert 0 < len(refusal.value.reason) < 250
    assert "\n" not in refusal.value.reason


@pytest.mark.parametrize("case", [*legal(), *BAD], ids=lambda case: case.name)
def test_an_image_that_can_be_read_has_a_header(case: Case):
    try:
        header = read_header(case.data)
    except ImageError:
        assert case.truth is None
    else:
        assert header.format
        assert case.truth is None or sorted((header.height, header.width)) == sorted(case.truth.shape[:2])


@pytest.mark.parametrize(("seed", "count"), [(0, 600), pytest.param(1, 10_000, marks=pytest.mark.slow)])
def test_rotten_bytes_never_raise_anything_else(seed, count):
    generator = np.random.default_rng(seed)
    files = [case.data for case in legal() if len(case.data) < 20_000]
    for number in range(count):
        data = bytearray(files[generator.integers(len(files))])
        for place in generator.integers(len(data), size=generator.integers(1, 6)):
            data[place] = generator.integers(256)
        with suppress(ImageError):
            read_image(bytes(data), pixels=Pixels(type=("uint8", "any")[number % 2]))


def test_a_file_on_disk_gives_the_same_as_its_bytes(tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(encode(Image.fromarray(colour()), "PNG"))
    assert torch.equal(read_image(file), read_image(file.read_bytes()))


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "nothing", "ring"])
def test_only_ordinary_files_are_opened(tmp_path, kind):
    path = tmp_path / "x.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("device", "ring"):
        path.symlink_to("/dev/zero" if kind == "device" else path)
    with pytest.raises(ImageError, match=r"not an ordinary file|No such file|symbolic links"):
        read_image(path)


def test_a_huge_file_is_refused_unread(tmp_path):
    file = tmp_path / "x.jpg"
    with file.open("wb") as content:
        content.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ImageError, match="256 MiB"):
        read_image(file)


@pytest.mark.parametrize(
    ("fmt", "words"), [("JPEG", "as a TIFF in tiles"), ("PNG", "as a TIFF in tiles"), ("TIFF", "")]
)
def test_a_picture_above_the_size_says_in_which_form_it_is_read(fmt, words, monkeypatch):
    monkeypatch.setattr("mim.data.files.MAX_PIXELS", 100)
    image = Image.new("I;16" if fmt == "TIFF" else "RGB", (20, 10))
    with pytest.raises(ImageError, match="20x10 pixels, more than the limit") as refusal:
        read_image(encode(image, fmt), 3)
    assert refusal.value.reason.partition("million; ")[2].startswith(words or "--windows 512 of pretrain")


def test_an_error_survives_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(ImageError("a/b.jpg", "truncated")))
    assert (type(error), error.path, error.reason) == (ImageError, "a/b.jpg", "truncated")


def test_an_error_shows_no_control_characters():
    assert str(ImageError("a\n\x1b[31m.jpg", "bad")) == r"a\n\x1b[31m.jpg: bad"


def test_odd_metadata_warns_nobody(tmp_path):
    file = tmp_path / "image.jpg"
    file.write_bytes(next(case.data for case in legal() if case.name == "exif-broken.jpg"))
    # A process of its own, because pytest puts its filters before ours.
    program = f"from pathlib import Path; from mim.data.images import read_image; read_image(Path({str(file)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "TIFF"])
def test_grey_from_a_colour_picture(fmt):
    image = Image.fromarray(np.full((4, 5, 3), (200, 100, 50), np.uint8))
    grey = read_image(encode(image, fmt), channels=1)
    assert grey.shape == (1, 4, 5)
    assert grey.float().mean().item() == pytest.approx(0.299 * 200 + 0.587 * 100 + 0.114 * 50, abs=2)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (2000, np.float16, 8),
        (255, np.float16, 255),
        (2**63 - 1, np.int64, 255),
        (2**64 - 1, np.uint64, 255),
        (2**62, np.int64, 128),
        (65535, np.int64, 255),
    ],
)
@pytest.mark.filterwarnings("error")
def test_numbers_at_the_end_of_their_type_are_scaled_without_a_warning(value, kind, expected):
    assert read_image(npy(np.full((8, 8), value, kind)), pixels=EIGHT_BIT).unique().tolist() == [expected]


def test_a_colour_array_becomes_grey():
    assert read_image(npy(np.full((4, 5, 3), 9, np.uint8)), channels=1).unique().tolist() == [9]


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
@pytest.mark.parametrize("first", [False, True])
def test_many_channels_from_arrays_and_tiff(channels, first):
    array = np.random.default_rng(0).integers(0, 65536, (20, 30, channels), np.uint16)
    stored = array.transpose(2, 0, 1) if first else array
    planar = {"planarconfig": "separate" if first else "contig", "photometric": "minisblack"}
    for data in (npy(stored), tiff(stored, **planar)):
        assert np.array_equal(pixels(data, channels, Pixels(type="uint16")), array)
        difference = np.abs(pixels(data, channels).astype(float) - array / 257)
        assert difference.max() <= 0.5


def test_channels_as_pages_of_a_tiff():
    array = np.arange(5 * 20 * 30, dtype=np.uint8).reshape(5, 20, 30)
    assert np.array_equal(read_image(tiff(array, photometric="minisblack"), channels=5), array)


@pytest.mark.parametrize("data", [encode(Image.fromarray(colour()), "PNG"), npy(colour()), npy(colour()[..., 0])])
def test_a_wrong_number_of_channels_is_refused(data):
    with pytest.raises(ImageError, match="4 channels"):
        read_image(data, channels=4)


def test_a_ring_of_pages_ends():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:  # unequal pages: tifffile itself would go round for ever
        for shape in ((20, 30), (10, 12)):
            file.write(np.zeros(shape), photometric="minisblack", metadata=None)
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        first, last = file.pages[0], file.pages[1]
        struct.pack_into("<I", data, last.offset + 2 + 12 * len(last.tags), first.offset)
    with pytest.raises(ImageError, match="different shapes"):
        read_image(bytes(data), channels=4)


@pytest.mark.parametrize("pages", [3, 5])
def test_a_wrong_number_of_pages_is_refused(pages):
    with pytest.raises(ImageError, match="4 channels"):
        read_image(tiff(np.zeros((pages, 20, 30), np.uint8), photometric="minisblack"), channels=4)


def test_a_huge_tiff_of_many_channels_is_refused_from_its_header():
    data = bytearray(tiff(np.zeros((16, 16, 4), np.uint8), photometric="rgb"))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        places = [file.pages[0].tags[name].valueoffset for name in ("ImageWidth", "ImageLength")]
    for place in places:
        data[place : place + 2] = b"\xff\xff"
    with pytest.raises(ImageError, match="more than the limit"):
        read_image(bytes(data), channels=4)


def test_the_picture_in_an_orientation_unknown_to_exif_stays():
    image = Image.fromarray(colour())
    assert torch.equal(read_image(encode(image, "PNG", exif=exif(200))), read_image(encode(image, "PNG")))

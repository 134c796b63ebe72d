"""Numbers of any type and layout, against what tifffile, imagecodecs and numpy put into the file."""

import io
import struct

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from hostile import encode, exif, npy, png, rows_of, tiff
from PIL import Image

from mim.data.images import MAX_NODATA, ImageError, read_header, read_image
from mim.data.pixels import Pixels

TYPES = {"uint16": np.uint16, "int16": np.int16, "float16": np.float16, "float32": np.float32, "float64": np.float64}
KEPT = {"uint16": torch.uint16, "int16": torch.int16, "float16": torch.float32, "float64": torch.float32}


def numbers(kind="uint16", channels=1, height=24, width=40):
    """``(H, W, C)``: a few hundred levels in a corner of the type's range, as cameras give."""
    values = np.random.default_rng(0).integers(148, 3100, (height, width, channels))
    return (values - 1500 if kind[0] != "u" else values).astype(TYPES[kind])


def read(data, channels=1, **form):
    return read_image(data, channels, pixels=Pixels(**{"type": "any"} | form)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("suffix", ["tif", "npy"])
def test_numbers_arrive_as_they_are_stored(kind, suffix):
    stored = numbers(kind)
    image = read_image(tiff(stored[..., 0]) if suffix == "tif" else npy(stored), 1)
    assert image.dtype == KEPT.get(kind, torch.float32)
    assert np.array_equal(image[0].numpy(), stored[..., 0])


def test_true_and_false_are_white_and_black():
    image = read_image(npy(numbers(channels=2) > 1500), 2)
    assert image.dtype == torch.uint8
    assert set(image.unique().tolist()) == {0, 255}


@pytest.mark.parametrize("fully", [True, False])
def test_an_image_with_transparent_pixels_is_of_the_type_of_the_others(fully):
    stored = numbers(channels=4)
    stored[..., 3] = 65535
    stored[:3, :3, 3] *= not fully
    data = tiff(stored, photometric="rgb", extrasamples=["unassalpha"])
    image = read_image(data, 3, pixels=Pixels(type="uint16"))
    assert bool(image[0].isnan().any() if fully else image.dtype == torch.uint16)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd", "lerc", "lzma", "jpeg2000", "packbits"])
@pytest.mark.parametrize("layout", ["tiles", "strips", "big"])
def test_every_compression_of_a_tiff_gives_the_samples(compression, layout):
    stored = numbers(channels=3)
    form = {"tiles": {"tile": (16, 16)}, "strips": {"rowsperstrip": 7}, "big": {"bigtiff": True}}[layout]
    assert np.array_equal(read(tiff(stored, photometric="rgb", compression=compression, **form), 3), stored)


@pytest.mark.parametrize("kind", ["uint16", "float32"])
@pytest.mark.parametrize("compression", ["lzw", "deflate"])
def test_predictors_are_undone(kind, compression):
    stored = numbers(kind)[..., 0]
    assert np.array_equal(read(tiff(stored, compression=compression, predictor=True))[..., 0], stored)


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("photometric", ["rgb", "minisblack"])
def test_planes_of_a_tiff_are_channels(photometric, compression):
    stored = numbers(channels=3)
    planes = {"planarconfig": "separate", "photometric": photometric, "compression": compression}
    assert np.array_equal(read(tiff(stored.transpose(2, 0, 1), **planes), 3), stored)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("planar", [True, False])
@pytest.mark.parametrize(("photometric", "channels"), [(2, 3), (1, 1), (1, 3), (0, 1)])
def test_samples_of_12_bit_that_lie_packed_in_a_tiff_are_unpacked(photometric, channels, planar, order):
    stored = numbers(channels=channels, width=41) % 4096  # 41: rows end within a byte
    data = packed(stored, planar, photometric, order)
    assert np.array_equal(read(data, channels), 4095 - stored if photometric == 0 else stored)


def packed(values, planar, photometric, order):
    """A TIFF of ``(H, W, C)`` numbers of 12 bit, rows filled up to whole bytes."""
    height, width, count = values.shape
    planes = np.moveaxis(values, -1, 0) if planar else values.reshape(1, height, -1)
    bits = np.unpackbits(planes.astype(">u2")[..., None].view(np.uint8), axis=-1)[..., 4:]
    strips = [np.packbits(plane, axis=-1).tobytes() for plane in bits.reshape(len(planes), height, -1)]
    data = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))
    places = []
    for strip in strips:
        places.append(len(data))
        data += strip + bytes(len(strip) % 2)
    entries = b""
    sizes, tags = [len(strip) for strip in strips], {256: [width], 257: [height], 258: [12] * count, 259: [1]}
    tags |= {262: [photometric], 273: places, 277: [count], 278: [height], 279: sizes, 284: [2 if planar else 1]}
    for tag, numbers_ in tags.items():
        content = struct.pack(f"{order}{len(numbers_)}I", *numbers_)
        if len(content) > 4:
            data += content
            content = struct.pack(f"{order}I", len(data) - len(content))
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers_)) + content
    struct.pack_into(f"{order}I", data, 4, len(data))
    return bytes(data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize("kind", ["imagej", "ome", "ome-z"])
def test_pages_that_imagej_or_ome_call_channels_are_channels(kind):
    stored = numbers(channels=3)
    pages = stored.transpose(2, 0, 1)
    if kind == "imagej":
        data = tiff(pages, imagej=True, metadata={"axes": "CYX"})
    elif kind == "ome":
        data = tiff(pages, ome=True, metadata={"axes": "CYX"}, photometric="minisblack")
    else:  # two slices of each channel: the first of each is the picture
        data = tiff(np.stack([pages, pages + 1], axis=1), ome=True, metadata={"axes": "CZYX"}, photometric="minisblack")
    assert np.array_equal(read(data, 3), stored)


@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_2000_keeps_its_depth(bits, channels):
    stored = numbers(channels=channels) >> max(0, 12 - bits)
    stored = stored if channels == 3 else stored[..., 0]
    data = imagecodecs.jpeg2k_encode(stored, level=0, reversible=True, bitspersample=bits)
    assert np.array_equal(np.squeeze(read(data, channels)), stored)


@pytest.mark.parametrize("fmt", ["jp2", "j2k"])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("channels", [2, 4, 13])
def test_all_components_of_jpeg_2000_are_bands(channels, bits, fmt):
    stored = (numbers(channels=channels) >> max(0, 12 - bits)).astype(np.uint8 if bits == 8 else np.uint16)
    data = imagecodecs.jpeg2k_encode(stored, level=0, reversible=True, bitspersample=bits, codecformat=fmt)
    assert np.array_equal(read(data, channels), stored)
    assert np.array_equal(read(data, 1, bands=(channels,)), stored[..., -1:])
    assert read_header(data, channels)[:4] == ("JPEG2000", f"{stored.dtype}x{channels}", 40, 24)


def test_the_fourth_component_of_jpeg_2000_is_opacity_only_if_the_file_says_so():
    stored = numbers(channels=4)
    stored[:2, :, 3] = 0
    data = imagecodecs.jpeg2k_encode(stored, level=0, reversible=True)
    with pytest.raises(ImageError, match="4 channels, where 3"):
        read_image(data, 3)
    entries = [(0, 0, 1), (1, 0, 2), (2, 0, 3), (3, 1, 0)]  # component, kind, which colour
    box = struct.pack(">I4sH", 10 + 6 * 4, b"cdef", 4) + b"".join(struct.pack(">3H", *entry) for entry in entries)
    start = data.index(b"jp2h")
    size = struct.unpack(">I", data[start - 4 : start])[0]
    end = start - 4 + size
    marked = data[: start - 4] + struct.pack(">I", size + len(box)) + data[start:end] + box + data[end:]
    image = read(marked, 3)
    assert np.isnan(image[:2]).all()
    assert np.array_equal(image[2:], stored[2:, :, :3])


@pytest.mark.parametrize("kind", [0, 2])
def test_16_bit_png_keeps_its_depth(kind):
    stored = numbers(channels=1 + kind)
    data = png(40, 24, 16, kind, rows_of(stored.astype(">u2")))
    assert np.array_equal(read(data, 1 + kind), stored)


@pytest.mark.parametrize("top", [1000, 4095, 65535])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_pnm_of_two_bytes_is_not_stretched(top, channels):
    stored = numbers(channels=channels) % top
    data = b"P%d 40 24 %d\n" % (5 if channels == 1 else 6, top) + stored.astype(">u2").tobytes()
    assert np.array_equal(read(data, channels), stored)


@pytest.mark.parametrize("turn", range(1, 9))
def test_the_orientation_of_a_tiff_of_floats_is_applied(turn):
    stored = numbers("float32")[..., 0]
    upright = np.asarray(Image.fromarray(stored).transpose(_TURNS[turn])) if turn > 1 else stored
    data = tiff(stored, extratags=[(274, "H", 1, turn, True)])
    assert np.array_equal(read(data)[..., 0], upright)


_TURNS = {
    **dict(zip((2, 3, 4, 5), (Image.Transpose(n) for n in (0, 3, 1, 5)), strict=True)),
    **dict(zip((6, 7, 8), (Image.Transpose(n) for n in (4, 6, 2)), strict=True)),
}


def test_a_jpeg_is_turned_as_pillow_turns_it():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8))
    for turn in range(1, 9):
        data = encode(picture, "JPEG", exif=exif(turn))
        assert torch.equal(read_image(data), read_image(data, pixels=Pixels(type="per_file"))), turn


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}], ids=str)
def test_pixels_of_a_jpeg_are_pillows(mode, channels, options):
    y, x = np.mgrid[:37, :53]
    picture = Image.fromarray(np.stack([x * 4, y * 6, x + y], -1).astype(np.uint8)).convert(mode)
    data = encode(picture, "JPEG", quality=80, **options if mode == "RGB" else {})
    assert torch.equal(read_image(data, channels), read_image(data, channels, pixels=Pixels(type="per_file")))


def test_a_jpeg_of_which_the_decoder_warns_is_refused_by_name():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encode(picture, "JPEG", quality=90)
    broken = data[:-400] + b"\xff\xd9"
    assert read_image(broken, pixels=Pixels(type="per_file")).shape == (3, 64, 64)  # grey below, and nobody told
    with pytest.raises(ImageError, match=r"a\.jpg: (Corrupt JPEG data|Premature end)"):
        read_image(broken, name="a.jpg")


# Channels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [npy, lambda a: tiff(a, photometric="minisblack", planarconfig="contig")])
def test_bands_are_read_in_the_order_asked_for(make):
    stored = numbers(channels=6)
    assert np.array_equal(read(make(stored), 3, bands=(4, 3, 2)), stored[..., [3, 2, 1]])


def test_bands_of_a_picture_are_red_green_and_blue():
    picture = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    data = encode(Image.fromarray(picture), "PNG")
    assert np.array_equal(read(data, 2, bands=(3, 1)), picture[..., [2, 0]])


@pytest.mark.parametrize(("found", "asked"), [(4, 3), (2, 1), (13, 3), (1, 4)])
def test_another_number_of_channels_is_told_as_a_number(found, asked):
    stored = numbers(channels=found)
    planar = {} if found == 1 else {"planarconfig": "contig"}
    data = tiff(stored.squeeze(), photometric="minisblack", compression="lzw", **planar)
    with pytest.raises(ImageError, match=rf"{found} channels?, where {asked}") as refusal:
        read_image(data, asked)
    assert refusal.value.channels == found


def test_colours_of_16_bit_become_grey_in_16_bit():
    stored = np.full((4, 5, 3), (3000, 2000, 1000), np.uint16)
    assert np.unique(read(tiff(stored, photometric="rgb"))).tolist() == [
        round(0.299 * 3000 + 0.587 * 2000 + 0.114 * 1000)
    ]


# Nodata --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [np.nan, np.inf, -9999.0, 0.0])
def test_whatever_a_file_writes_for_nodata_it_reads_the_same(written):
    stored = numbers("float32", channels=2) + 5000
    expected = stored.copy()
    stored[3:7, 4:9, 1], expected[3:7, 4:9] = written, np.nan  # missing in one band is missing
    form = {} if not np.isfinite(written) else {"nodata": written}
    np.testing.assert_array_equal(read(npy(stored), 2, **form), expected)


def test_what_a_geotiff_calls_nodata_is():
    stored = numbers()[..., 0]
    stored[:4] = 7
    image = read(tiff(stored, extratags=[(42113, "s", 0, "7", True)]))
    assert np.isnan(image[:4]).all()
    assert np.array_equal(image[4:, :, 0], stored[4:])


def test_clear_pixels_of_16_bit_are_nodata():
    stored = np.dstack([numbers(channels=3), np.full((24, 40), 65535, np.uint16)])
    stored[:2, :, 3] = 0
    image = read(tiff(stored, photometric="rgb", extrasamples=["unassalpha"]), 3)
    assert np.isnan(image[:2]).all()
    assert np.array_equal(image[2:], stored[2:, :, :3])


def test_an_image_of_almost_nothing_but_nodata_is_refused():
    stored = np.full((20, 20), np.nan, np.float32)
    stored[0, :3] = 1
    with pytest.raises(ImageError, match=f"99% of its pixels are nodata, more than the limit of {MAX_NODATA:.0%}"):
        read_image(npy(stored), 1)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_whole_numbers_that_float32_would_change_are_refused():
    assert read(npy(np.full((4, 4), 1 << 24, np.int32))).max() == 1 << 24
    with pytest.raises(ImageError, match="float32 would change them"):
        read_image(npy(np.full((4, 4), (1 << 24) + 1, np.int32)), 1)


@pytest.mark.parametrize("compression", [None, "lzw"])
def test_half_a_tiff_of_floats_is_refused(compression):
    data = tiff(np.random.default_rng(0).random((64, 64), np.float32), compression=compression)
    with pytest.raises(ImageError, match="truncated"):
        read_image(data[: len(data) // 2], 1)


def test_a_file_of_another_type_than_its_set_is_refused():
    with pytest.raises(ImageError, match="holds float32, the other files uint16"):
        read_image(npy(numbers("float32")), 1, pixels=Pixels(type="uint16"))


def test_a_tiff_that_claims_to_be_wide_is_refused_before_it_is_decoded():
    data = bytearray(tiff(numbers()[..., 0], compression="lzw"))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        place = file.pages[0].tags["ImageWidth"].valueoffset
    data[place : place + 2] = b"\xff\xff"
    with pytest.raises(ImageError, match="longer than 200:1"):
        read_image(bytes(data), 1)

"""Windows of large images: what is cut, where windows lie, and that they hold what the whole image holds there."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from mim.data.bad_files import BadFileWarning
from mim.data.crops import Crops
from mim.data.files import UnmeasuredError
from mim.data.images import ImageError, read_image
from mim.data.pixels import AS_STORED, Pixels
from mim.data.pretrain import PretrainData
from mim.data.sources import FolderSource
from mim.data.views import SingleView
from mim.data.windows import Windows, WindowSource
from mim.errors import UserError

HEIGHT, WIDTH = 150, 210


def numbers(kind="uint16", channels=1, height=HEIGHT, width=WIDTH):
    values = np.random.default_rng(0).integers(1, 250, (height, width, channels))
    return (values - 120 if kind == "int16" else values).astype(kind)


def tiff(file, values, **form):
    """``(H, W, C)`` in a TIFF, grey if there is one channel."""
    if form.get("planarconfig") == "separate":
        values = values.transpose(2, 0, 1)
    elif values.shape[2] > 1:
        form.setdefault("planarconfig", "contig")
    tifffile.imwrite(file, values[..., 0] if values.shape[-1] == 1 else values, **{"photometric": "minisblack"} | form)


def windows_of(folder, channels=1, side=64, stride=None, pixels=AS_STORED):
    return WindowSource(FolderSource(folder, channels), Windows(side, stride or side), pixels)


def expected(values, source):
    """Crops of ``(H, W, C)`` where the names of the windows say."""
    for index in range(len(source)):
        rows, columns = source.describe(index).rpartition("[")[2].rstrip("]").split(",")
        yield index, values[slice(*map(int, rows.split(":"))), slice(*map(int, columns.split(":")))]


TIFFS = {
    "tiles": {"tile": (32, 48)},
    "tiles, LZW, predictor": {"tile": (64, 64), "compression": "lzw", "predictor": True},
    "tiles, ZSTD, BigTIFF": {"tile": (64, 64), "compression": "zstd", "bigtiff": True},
    "strips": {"rowsperstrip": 7, "compression": "deflate"},
    "strips as they are": {"rowsperstrip": 16},
    "one strip as it is": {"rowsperstrip": HEIGHT},
    "big-endian": {"byteorder": ">"},
    "big-endian tiles": {"byteorder": ">", "tile": (32, 32)},
}
PLANES = {f"planes, {name}": form | {"planarconfig": "separate"} for name, form in TIFFS.items()}


@pytest.mark.parametrize("layout", [*TIFFS, *PLANES])
@pytest.mark.parametrize(("kind", "channels"), [("uint8", 4), ("uint16", 3), ("int16", 2), ("float32", 6)])
def test_windows_of_a_tiff_hold_its_samples(layout, kind, channels, tmp_path):
    tiff(tmp_path / "a.tif", values := numbers(kind, channels), **(TIFFS | PLANES)[layout])
    source = windows_of(tmp_path, channels)
    assert len(source) == 3 * 4
    for index, part in expected(values, source):
        image = source.read(index)
        assert str(image.dtype) == f"torch.{kind}"
        assert np.array_equal(image.permute(1, 2, 0).numpy(), part)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float16", "float64", "bool"])
@pytest.mark.parametrize("layout", TIFFS)
def test_windows_of_a_grey_tiff_are_parts_of_what_is_read_as_a_whole(kind, layout, tmp_path):
    if kind in ("float16", "bool") and "predictor" in layout:
        pytest.skip("tifffile does not write that")
    values = numbers("uint8") > 120 if kind == "bool" else numbers(kind)
    tiff(tmp_path / "a.tif", values, **TIFFS[layout])
    whole = read_image(tmp_path / "a.tif", 1)
    source = windows_of(tmp_path)
    for index, part in expected(whole.permute(1, 2, 0).numpy(), source):
        assert torch.equal(source.read(index), torch.from_numpy(part.copy()).permute(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("layout", ["tiles", "strips", "one strip as it is"])
def test_windows_of_a_turned_tiff_lie_in_the_upright_image(orientation, layout, tmp_path):
    tag = [(274, "H", 1, orientation, True)]
    tiff(tmp_path / "a.tif", numbers(channels=3), photometric="rgb", extratags=tag, **TIFFS[layout])
    whole = read_image(tmp_path / "a.tif", 3)
    source = windows_of(tmp_path, 3)
    for index, part in expected(whole.permute(1, 2, 0).numpy(), source):
        assert np.array_equal(source.read(index).permute(1, 2, 0).numpy(), part)


@pytest.mark.parametrize("layout", ["channels last", "channels first", "Fortran", "big-endian"])
@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_windows_of_an_array_hold_its_numbers(layout, kind, tmp_path):
    values = numbers(kind, 5)
    own = {
        "channels first": values.transpose(2, 0, 1),
        "Fortran": np.asfortranarray(values),
        "big-endian": values.astype(values.dtype.newbyteorder(">")),
    }
    np.save(tmp_path / "a.npy", own.get(layout, values))
    source = windows_of(tmp_path, 5)
    for index, part in expected(values, source):
        assert np.array_equal(source.read(index).permute(1, 2, 0).numpy(), part)


def test_pages_that_are_channels_are_read_by_offset_too(tmp_path):
    values = numbers(channels=4)
    tifffile.imwrite(tmp_path / "a.tif", values.transpose(2, 0, 1), photometric="minisblack", metadata=None)
    source = windows_of(tmp_path, 4)
    for index, part in expected(values, source):
        assert np.array_equal(source.read(index).permute(1, 2, 0).numpy(), part)


def test_bands_are_chosen_from_windows(tmp_path):
    tiff(tmp_path / "a.tif", values := numbers(channels=6), tile=(32, 32))
    source = windows_of(tmp_path, 2, pixels=Pixels(type="any", bands=(5, 2)))
    for index, part in expected(values[..., [4, 1]], source):
        assert np.array_equal(source.read(index).permute(1, 2, 0).numpy(), part)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_is_decoded_whole_for_each_window(suffix, tmp_path):
    Image.fromarray(numbers("uint8", 3)).save(tmp_path / f"a.{suffix}")
    whole = read_image(tmp_path / f"a.{suffix}", 3).permute(1, 2, 0).numpy()
    source = windows_of(tmp_path, 3)
    for index, part in expected(whole, source):
        assert np.array_equal(source.read(index).permute(1, 2, 0).numpy(), part)


def test_tiles_of_jpeg_are_decoded_with_their_tables(tmp_path):
    photo = np.asarray(Image.fromarray(numbers("uint8", 3)).resize((400, 300)))
    tifffile.imwrite(tmp_path / "a.tif", photo, photometric="rgb", compression="jpeg", tile=(64, 64))
    source = windows_of(tmp_path, 3)
    for index, part in expected(tifffile.imread(tmp_path / "a.tif"), source):
        assert np.array_equal(source.read(index).permute(1, 2, 0).numpy(), part)


def test_transparent_colours_are_laid_over_white_as_in_a_whole_picture(tmp_path):
    values = numbers("uint8", 4)
    tiff(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unassalpha"], tile=(32, 32))
    whole = read_image(tmp_path / "a.tif", 3).permute(1, 2, 0).numpy()
    source = windows_of(tmp_path, 3)
    for index, part in expected(whole, source):
        assert np.array_equal(source.read(index).permute(1, 2, 0).numpy(), part)


# Where they lie ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "stride", "starts"),
    [
        (64, 64, [0, 64, 86]),
        (50, 50, [0, 50, 100]),
        (64, 32, [0, 32, 64, 86]),
        (150, 64, [0]),
        (200, 64, [0]),
        (20, 60, [0, 60, 120, 130]),
    ],
)
def test_the_last_window_is_moved_inwards(side, stride, starts):
    windows = Windows(side, stride)
    assert windows.counts(150, 150) == (len(starts), len(starts))
    boxes = [windows.box(number, 150, 150) for number in range(len(starts) ** 2)]
    assert [(box.top, box.left) for box in boxes] == [(top, left) for top in starts for left in starts]
    assert {(box.height, box.width) for box in boxes} == {(min(side, 150),) * 2}


def test_an_image_that_is_small_in_one_direction_gives_windows_that_are(tmp_path):
    np.save(tmp_path / "a.npy", numbers(height=40, width=210))
    source = windows_of(tmp_path)
    assert {tuple(source.read(index).shape) for index in range(len(source))} == {(1, 40, 64)}


def test_an_image_that_is_no_larger_stays_whole_and_keeps_its_name(tmp_path):
    np.save(tmp_path / "a.npy", numbers(height=64, width=30))
    np.save(tmp_path / "b.npy", numbers(height=65, width=30))
    source = windows_of(tmp_path)
    names = [source.describe(index) for index in range(len(source))]
    assert names == [f"{tmp_path}/a.npy", f"{tmp_path}/b.npy[0:64,0:30]", f"{tmp_path}/b.npy[1:65,0:30]"]
    assert source.findings() == ["1 of 2 images are cut into windows of 64x64: 3 in all; 1 are smaller and stay whole"]


def test_windows_have_the_label_of_their_image(tmp_path):
    for name, width in (("x", 64), ("y", 128)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", numbers(height=64, width=width))
    source = windows_of(tmp_path)
    assert (source.labels, source.classes) == ([0, 1, 1], ["x", "y"])


@pytest.mark.parametrize(
    ("side", "stride", "text"),
    [(None, 64, "--stride 64"), (8, None, "--windows 8"), (10000, None, "--windows 10000"), (64, 0, "--stride 0")],
)
def test_a_grid_that_cannot_be_is_refused(side, stride, text):
    with pytest.raises(UserError, match=text):
        Windows.of(side, stride)


# What is wrong with them ---------------------------------------------------------------------------------------------


def scene(folder, missing=slice(0, 64)):
    values = numbers("float32", height=128, width=256)
    values[:, missing] = np.nan
    np.save(folder / "a.npy", values)


def test_a_window_without_measurement_is_passed_over_and_no_bad_file(tmp_path):
    scene(tmp_path)
    source = windows_of(tmp_path)
    with pytest.raises(UnmeasuredError, match=r"a.npy\[0:64,0:64\]: 100% of its pixels are nodata"):
        source.read(0)
    views = SingleView()
    views.configure((32, 32), [0.5], [0.25], Pixels(type="float32"))
    crops = Crops(source, views, seed=0)
    index, (_, _, _, bad) = crops.load((0, 0))
    assert index != 0
    assert bad == []
    assert crops.load((0, 0))[0] == index


def test_the_check_before_a_run_tells_how_many_windows_are_nodata(tmp_path):
    scene(tmp_path)
    data = PretrainData(str(tmp_path), windows=64, batch_size=2)
    data.open((32, 32), 1, 0)
    data.check()
    assert data.source.findings()[-1] == "25% of the windows are nodata: others are taken in their place"
    assert data.bad_files.reasons == {}


def test_an_image_that_cannot_be_cut_stops_a_run_or_is_named(tmp_path):
    scene(tmp_path)
    (tmp_path / "b.tif").write_bytes(b"II*\0 no tags")
    with pytest.raises(UserError, match="1 of 2 images are unreadable") as error:
        PretrainData(str(tmp_path), windows=64).open((32, 32), 1, 0)
    assert "--windows 64 --fix good.csv" in error.value.hint
    data = PretrainData(str(tmp_path), windows=64, max_bad=0.5, batch_size=2)
    data.open((32, 32), 1, 0)
    with pytest.warns(BadFileWarning, match="b.tif cannot be read"):
        data.check()
    assert list(data.bad_files.reasons) == [f"{tmp_path}/b.tif"]


def test_a_damaged_tile_makes_the_windows_that_touch_it_unreadable_by_name(tmp_path):
    tiff(tmp_path / "a.tif", numbers(channels=1), tile=(64, 64), compression="deflate")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        offset = file.pages[0].dataoffsets[5]
    with (tmp_path / "a.tif").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 20)
    source = windows_of(tmp_path)
    bad = []
    for index in range(len(source)):
        try:
            source.read(index)
        except ImageError as error:
            bad.append(error.path)
    assert [name.partition("[")[2] for name in bad] == ["64:128,64:128]", "86:150,64:128]"]


@pytest.mark.parametrize("name", ["a.tif", "a.npy"])
def test_a_file_that_ends_early_is_refused_before_training(name, tmp_path):
    if name == "a.npy":
        np.save(tmp_path / name, numbers())
    else:
        tiff(tmp_path / name, numbers())
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1000])
    assert "truncated" in str(windows_of(tmp_path).damaged[0])


def test_a_large_compressed_strip_and_a_large_picture_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("mim.data.windows.MAX_PICTURE_PIXELS", 1000)
    monkeypatch.setattr("mim.data.tiff.MAX_SEGMENT_BYTES", 1 << 14)
    Image.new("L", (100, 80)).save(tmp_path / "a.png")
    tiff(tmp_path / "b.tif", numbers(), compression="deflate", rowsperstrip=HEIGHT)
    reasons = [error.reason for error in windows_of(tmp_path).damaged]
    assert "PNG, which is decoded whole for each window" in reasons[0]
    assert "stored in pieces of" in reasons[1]


def test_all_files_with_other_channels_are_one_error_that_names_the_option(tmp_path):
    np.save(tmp_path / "a.npy", numbers(channels=4))
    with pytest.raises(UserError, match="the images have 4 channels, the model takes 3") as error:
        PretrainData(str(tmp_path), windows=64).open((32, 32), 3, 0)
    assert error.value.hint.startswith("--in_chans 4")


@pytest.mark.parametrize(
    ("path", "more", "text"),
    [("builtin", {}, "--windows 64: not of builtin"), (None, {"value_range": "per_file"}, "exclude each other")],
)
def test_what_cannot_be_cut_is_refused(path, more, text, tmp_path):
    np.save(tmp_path / "a.npy", numbers())
    with pytest.raises(UserError, match=text):
        PretrainData(path or str(tmp_path), windows=64, **more).open((32, 32), 3, 0)


def test_a_step_is_the_same_however_it_is_loaded(tmp_path):
    scene(tmp_path)
    tiff(tmp_path / "b.tif", numbers("float32"), tile=(32, 32))
    batches = []
    for _ in range(2):
        data = PretrainData(str(tmp_path), windows=64, stride=48, batch_size=4)
        data.open((32, 32), 1, 3)
        data.check()
        batches.append([data.batch(step) for step in (5, 0)])
    for one, other in zip(*batches, strict=True):
        assert one[2] == other[2]
        assert torch.equal(one[0][0], other[0][0])

"""One scale for all files of a set: what is measured, and that it is monotone, unclipped and the same for all."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mim.data.crops import collate
from mim.data.measuring import measure
from mim.data.pixels import AS_STORED, EIGHT_BIT, Pixels, canonical_range, parse_bands, parse_range
from mim.data.pretrain import MixedTypesWarning, OldScaleWarning, PretrainData
from mim.data.views import IMAGENET_MEAN, MultiCrop, SingleView, resized
from mim.errors import UserError
from mim.randomness import RowGenerator

DTYPES = {"uint8": np.uint8, "uint16": np.uint16, "int16": np.int16, "float32": np.float32}


def folder_of(path: Path, arrays) -> str:
    path.mkdir()
    for number, array in enumerate(arrays):
        np.save(path / f"{number:03}.npy", array)
    return str(path)


def camera(count=6, top=3100, seed=0, kind=np.uint16):
    """Images in which one pixel of a hundred thousand is a hot one."""
    return [np.random.default_rng(seed + i).integers(148, top, (24, 30, 1)).astype(kind) for i in range(count)]


def opened(path, channels=1, **options):
    data = PretrainData(path, num_workers=0, batch_size=2, **options)
    data.open((16, 16), channels, seed=0)
    data.check()
    return data


def test_unsigned_numbers_start_at_0_and_end_at_the_upper_percentile(tmp_path):
    images = camera()
    data = opened(folder_of(tmp_path / "a", images))
    top = np.percentile(np.stack(images), 99.9)
    assert (data.pixels.type, data.pixels.low, data.pixels.high) == ("uint16", (0.0,), (pytest.approx(top),))
    assert data.mean == pytest.approx([np.stack(images).mean() / top], rel=1e-4)
    assert data.std == pytest.approx([np.stack(images).std() / top], rel=1e-4)


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_signed_numbers_lie_between_both_percentiles(tmp_path, kind):
    images = [image.astype(kind) - kind(2000) for image in camera()]
    data = opened(folder_of(tmp_path / "a", images))
    low, high = np.percentile(np.stack(images), [0.1, 99.9])
    assert (data.pixels.low, data.pixels.high) == ((pytest.approx(low),), (pytest.approx(high),))


def test_the_line_tells_values_scale_statistics_and_how_to_fix_them(tmp_path):
    images = [np.full((20, 20, 1), value, np.uint16) for value in (148, 3100)]
    assert opened(folder_of(tmp_path / "a", images)).describe_values() == (
        "values 148..3100 in uint16, scaled by 3100; mean 0.52 std 0.48, measured on 2 images; "
        "fix with --value_range 0,3100"
    )


def test_8_bit_colours_keep_their_scale_and_imagenets_statistics(tmp_path):
    data = opened(folder_of(tmp_path / "a", camera(top=200, kind=np.uint8) and [np.zeros((9, 9, 3), np.uint8)] * 4), 3)
    assert data.pixels == EIGHT_BIT
    assert data.mean == list(IMAGENET_MEAN)
    assert data.plain


def test_8_bit_of_other_channels_is_measured(tmp_path):
    data = opened(folder_of(tmp_path / "a", camera(top=200, kind=np.uint8)))
    assert data.pixels.type == "uint8"
    assert data.pixels.high[0] == pytest.approx(199, abs=1)
    assert not data.plain


def test_what_was_found_is_what_settings_say_again(tmp_path):
    path = folder_of(tmp_path / "a", camera())
    first = opened(path)
    again = opened(path, **first.settings())
    assert again.measured is None
    assert (again.pixels, again.mean, again.std) == (first.pixels, first.mean, first.std)


def test_a_given_range_is_kept_and_statistics_are_measured_on_it(tmp_path):
    data = opened(folder_of(tmp_path / "a", camera()), value_range="0,4095")
    assert (data.pixels.low, data.pixels.high) == ((0.0,), (4095.0,))
    assert data.mean == pytest.approx([np.stack(camera()).mean() / 4095], rel=1e-4)


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        ("0,4095", (0,), (4095,)),
        ("[0, 4095]", (0,), (4095,)),
        ("(-1e1,.5)", (-10,), (0.5,)),
        ("[[0,1],[-30,5]]", (0, -30), (1, 5)),
        ("[[0, 1]]", (0,), (1,)),
        ([[0, 1], [-30, 5]], (0, -30), (1, 5)),
        ((0, 1), (0,), (1,)),
    ],
)
def test_a_range_is_read_as_it_is_typed_and_as_a_file_holds_it(given, low, high):
    assert parse_range(given) == (low, high)


def test_a_range_for_each_channel_scales_each(tmp_path):
    two = [np.concatenate([image, image.astype(np.float32) * 10], -1).astype(np.float32) for image in camera()]
    data = opened(folder_of(tmp_path / "a", two), 2, value_range=[[0, 4000], [0, 40000]])
    assert data.mean[0] == pytest.approx(data.mean[1], rel=1e-4)
    with pytest.raises(UserError, match="2 ranges, images have 1 channel"):
        opened(folder_of(tmp_path / "b", camera()), 1, value_range=[[0, 1], [0, 2]])


def test_clipped_values_stay_within_the_range():
    views = SingleView()
    views.configure((4, 4), [0.5], [0.5], Pixels((10.0,), (20.0,), "uint16", clip=True))
    images = torch.tensor([0, 10, 15, 20, 99]).to(torch.uint16).view(1, 1, 1, 5)
    assert views.scale(images).flatten().tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


@given(
    kind=st.sampled_from(sorted(DTYPES)),
    ends=st.tuples(st.floats(-3e4, 6e4, width=32), st.floats(0.5, 6e4, width=32)),
    values=st.lists(st.integers(0, 255), min_size=2, max_size=12),
)
@settings(deadline=None, max_examples=60)
def test_any_range_of_any_type_is_monotone_unclipped_and_the_same_for_all_files(kind, ends, values):
    low, high = ends[0], ends[0] + ends[1]
    info = np.iinfo(DTYPES[kind]) if kind != "float32" else None
    numbers = np.array(values, np.float64) / 255 * ends[1] + low
    numbers = np.sort(numbers if info is None else numbers.clip(info.min, info.max)).astype(DTYPES[kind])
    views = SingleView()
    views.configure((4, 4), [0.0], [1.0], Pixels((low,), (high,), kind))
    image = torch.from_numpy(numbers).view(1, 1, 1, -1)
    together = views.scale(image).flatten()
    assert (together.diff()[torch.from_numpy(np.diff(numbers.astype(np.float64)) > 1e-3 * ends[1])] > 0).all()
    expected = (numbers.astype(np.float64) - low) / (high - low)
    np.testing.assert_allclose(together.numpy(), expected, rtol=1e-3, atol=1e-2)
    for place in range(len(numbers)):  # alone, as another file would hold it
        assert views.scale(image[..., place : place + 1]).item() == together[place].item()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32])
def test_crops_and_middles_keep_the_type_and_stay_within_it(dtype):
    ends = (0.0, 1.0) if dtype.is_floating_point else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    image = torch.full((2, 40, 50), ends[0], dtype=torch.float64)
    image[:, 20:] = ends[1]  # an edge, at which bicubic interpolation overshoots
    views = SingleView()
    views.configure((16, 16), [0.5] * 2, [0.5] * 2, Pixels(type="any"))
    for view in (*views.crop(image.to(dtype)), views.center(image.to(dtype))):
        assert (view.shape, view.dtype) == ((2, 16, 16), dtype)
        if not dtype.is_floating_point:
            steps = view.double().diff(dim=1)
            assert (steps >= -(ends[1] - ends[0]) / 8).all()  # wrapped around, it would fall by the whole range


def test_resizing_whole_numbers_rounds_what_floats_give():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 4096, (1, 30, 40))).to(torch.uint16)
    expected = resized(image.float(), [12, 20], [0.0])
    assert torch.equal(resized(image, [12, 20], [0.0]).float(), expected.clamp(0, 65535).round())


@pytest.mark.parametrize("number", [-9999.0, 0.0, 1e6])
def test_what_stands_for_nodata_changes_nothing(tmp_path, number):
    images = [np.random.default_rng(i).random((24, 30, 2), np.float32) + 1 for i in range(4)]
    written = {}
    for name, value in (("nan", np.nan), ("own", number)):
        holes = [image.copy() for image in images]
        for image in holes:
            image[:7, :9] = value
        options = {"nodata": number} if name == "own" else {}
        data = opened(folder_of(tmp_path / name, holes), 2, **options)
        torch.manual_seed(0)
        views = [data.views.crop(data.source.read(index)) for index in range(4)]
        batch = collate([(view, -1, key, []) for key, view in enumerate(views)])
        written[name] = (data.mean, data.std, data.views(batch[0], RowGenerator(batch[2]))[0], batch[4][0])
    assert written["nan"][:2] == written["own"][:2]
    assert torch.equal(written["nan"][2], written["own"][2])
    assert torch.equal(written["nan"][3], written["own"][3])
    valid = written["nan"][3]
    assert not valid.all()
    assert (written["nan"][2][~valid.expand(-1, 2, -1, -1)] == 0).all()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16])
@pytest.mark.parametrize("some", [1, 6])
def test_whole_numbers_keep_their_type_beside_files_with_nodata(tmp_path, kind, some):
    images = camera(6, top=200, kind=kind)
    for image in images[:some]:
        image[:8] = 3
    data = opened(folder_of(tmp_path / "a", images), nodata=3)
    assert (data.pixels.type, len(data.bad_files.reasons)) == (np.dtype(kind).name, 0)
    assert data.source.read(0)[:, :8].isnan().all()
    assert data.source.read(5).is_floating_point() == (some == 6)
    assert data.pixels.low == pytest.approx((0.0 if kind != np.int16 else 148.0,), abs=1)


def test_pixels_beside_nodata_that_count_are_made_of_measured_ones_alone():
    image = torch.ones(1, 40, 40)
    image[:, :, :13] = torch.nan
    small = resized(image, [16, 16], [500.0])
    assert small.isnan().any()
    torch.testing.assert_close(small[~small.isnan()], torch.ones(int((~small.isnan()).sum())), rtol=0, atol=0.6)


def test_a_mask_travels_only_with_batches_that_need_it():
    views = [[torch.ones(1, 4, 4)], [torch.ones(1, 4, 4)]]
    assert len(collate([(view, -1, key, []) for key, view in enumerate(views)])) == 4
    views[1][0][0, 0, 0] = torch.nan
    *_, valid = collate([(view, -1, key, []) for key, view in enumerate(views)])
    assert (valid[0].sum().item(), tuple(valid[0].shape)) == (31, (2, 1, 4, 4))


def test_colours_of_measurements_are_neither_clipped_nor_turned_over():
    views = MultiCrop(local_crops=0, local_size=16)
    views.configure((16, 16), [0.0], [1.0], Pixels((0.0,), (100.0,), "uint16"))
    batch = [torch.full((64, 1, 16, 16), 150).to(torch.uint16)] * 2  # beyond the range
    for view in views(batch, RowGenerator.for_rows(0, 0, 64)):
        assert view.min() > 0.5
        assert view.max() > 1.5


def test_all_processes_use_the_numbers_of_the_first(tmp_path):
    path = folder_of(tmp_path / "a", camera())
    first, other = opened(path), PretrainData(path, num_workers=0)
    other.open((16, 16), 1, seed=0)
    other.check(first=False)
    assert other.measured is None
    told = (first.pixels.facts(), first.mean, first.std)
    other.trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(broadcast=lambda own: told))
    other.setup("fit")
    assert (other.pixels, other.mean, other.std) == (first.pixels, first.mean, first.std)
    assert other.source.pixels == first.pixels
    image = first.source.read(0)[None]
    assert torch.equal(other.views.normalize(image), first.views.normalize(image))


# Types ---------------------------------------------------------------------------------------------------------------


def test_pictures_among_which_some_have_16_bit_are_all_taken(tmp_path):
    images = [np.full((20, 20, 3), 128, np.uint8)] * 5 + [np.full((20, 20, 3), 128 * 257, np.uint16)]
    with pytest.warns(MixedTypesWarning, match="5 uint8, 1 uint16"):
        data = opened(folder_of(tmp_path / "a", images), 3)
    assert data.pixels == EIGHT_BIT
    assert torch.equal(data.source.read(5), data.source.read(0))


@pytest.mark.filterwarnings("ignore::mim.data.bad_files.BadFileWarning")
def test_measurements_of_another_type_are_skipped_and_named(tmp_path):
    images = [*camera(9), np.zeros((20, 20, 1), np.float32)]
    data = PretrainData(folder_of(tmp_path / "a", images), num_workers=0, max_bad=0.5)
    data.open((16, 16), 1, seed=0)
    data.check()
    assert data.pixels.type == "uint16"
    with pytest.raises(Exception, match="holds float32, the other files uint16"):
        data.source.read(9)


@pytest.mark.filterwarnings("ignore::mim.data.bad_files.BadFileWarning")
def test_too_many_of_another_type_are_refused_before_the_first_step(tmp_path):
    images = [*camera(5), *[np.zeros((20, 20, 1), np.float32)] * 3]
    with pytest.raises(
        UserError, match=r"3 of 8 images are unreadable.*\nwhy: .*holds float32, the other files uint16"
    ):
        opened(folder_of(tmp_path / "a", images))


def test_with_a_given_range_all_numbers_are_taken_as_they_are(tmp_path):
    images = [*camera(3), np.full((20, 20, 1), 1000.0, np.float32)]
    data = opened(folder_of(tmp_path / "a", images), value_range=[0.0, 4000.0])
    assert data.pixels.type == "any"
    assert data.views.scale(data.source.read(3)[None]).unique().tolist() == [0.25]


def test_one_wrong_number_of_channels_in_all_files_is_one_error(tmp_path):
    with pytest.raises(UserError) as mistake:
        opened(folder_of(tmp_path / "a", [np.zeros((20, 20, 13), np.uint16)] * 5), 3)
    assert "the images have 13 channels, the model takes 3" in str(mistake.value)
    assert "--in_chans 13   or   --bands 3,2,1" in str(mistake.value)


@pytest.mark.parametrize("windows", [None, 16])
def test_a_band_that_no_file_has_is_one_error(tmp_path, windows):
    with pytest.raises(UserError, match="the images have 13 channels, --bands asks for number 30") as mistake:
        opened(folder_of(tmp_path / "a", [np.zeros((20, 20, 13), np.uint16)] * 3), 2, bands="4,30", windows=windows)
    assert mistake.value.hint == "--bands 2,1"


def test_bands_and_channels_of_the_model_must_agree(tmp_path):
    with pytest.raises(UserError, match="names 2 channels, the model takes 3"):
        opened(folder_of(tmp_path / "a", [np.zeros((20, 20, 5), np.uint16)]), 3, bands="2,1")


def test_settings_of_an_older_run_keep_its_scale_with_one_warning(tmp_path):
    data = PretrainData(folder_of(tmp_path / "a", camera(top=4000)), num_workers=0, value_range="per_file")
    data.open((16, 16), 1, seed=0)
    with pytest.warns(OldScaleWarning) as told:
        data.check()
    assert len(told) == 1
    assert (data.mean, data.std) == ([0.5], [0.25])
    assert data.source.read(0).dtype == torch.uint8
    assert data.source.read(0).max() <= 4000 / 257 + 1


def test_an_older_run_on_8_bit_colours_is_not_warned(tmp_path):
    data = PretrainData(folder_of(tmp_path / "a", [np.zeros((9, 9, 3), np.uint8)] * 3), value_range="per_file")
    data.open((16, 16), 3, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.check()


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0,4095", "[0, 4095]", [0, 4095.0], [[0, 4095]]])
def test_a_range_may_be_written_in_several_ways(text):
    assert parse_range(text) == ((0.0,), (4095.0,))
    if isinstance(text, str):
        assert canonical_range(text) == "[0.0, 4095.0]"


@pytest.mark.parametrize(
    "text",
    ["5", "a,b", "3,1", "1,1", "nan,2", "0,inf", [], [[0, 1], [2]], "1,2,3", "[[0,1],[5,-3]]", "0,[1,2]", "[0,1", ""],
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UserError, match="is no range"):
        parse_range(text)


@pytest.mark.parametrize("text", ["0", "a", "1,,2", [0], "-1"])
def test_what_are_no_bands_is_refused(text):
    with pytest.raises(UserError, match="no list of channels"):
        parse_bands(text)


@pytest.mark.parametrize("value", [0, 7, -3.5])
def test_a_set_of_one_number_is_measured_without_dividing_by_0(tmp_path, value):
    kind = np.float32 if value < 0 else np.uint16
    data = opened(folder_of(tmp_path / "a", [np.full((20, 20, 1), value, kind)] * 3))
    assert data.std == [1.0]
    assert data.views.normalize(data.source.read(0)[None]).abs().max() < 1e-5


def test_the_sample_is_keyed_by_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr("mim.data.measuring.SAMPLE", 3)
    data = opened(folder_of(tmp_path / "a", [image + 50 * i for i, image in enumerate(camera(20))]))
    same, other = (measure(data.source, 1, Pixels(type="uint16"), seed) for seed in (0, 1))
    assert (same.pixels, same.mean) == (data.pixels, data.mean)
    assert other.mean != same.mean


def test_facts_of_pixels_survive_json():
    for pixels in (AS_STORED, EIGHT_BIT, Pixels((0.0, 1.0), (2.0, 3.5), "int16", True, (2, 1), -9999.0)):
        assert Pixels.of(pixels.facts()) == pixels
    for broken in ("x", {"type": "eval"}, {"low": [1], "high": [0]}, {"low": ["a"], "high": [0]}):
        with pytest.raises(ValueError, match=r"."):
            Pixels.of(broken)


# Logarithms


def backscatter(count=4):
    """Ten powers of ten, a zero and a pixel without measurement."""
    images = [10 ** np.random.default_rng(i).uniform(-6, 4, (40, 30, 2)).astype(np.float32) for i in range(count)]
    for image in images:
        image[0, :2] = 0, np.nan
    return images


def test_logarithms_lie_between_both_percentiles_of_what_is_above_0(tmp_path):
    data = opened(folder_of(tmp_path / "a", backscatter()), 2, log_values=True)
    values = np.stack(backscatter())
    low, high = np.percentile(values[values > 0], [0.1, 99.9])
    assert (data.pixels.low, data.pixels.high) == ((pytest.approx(low, rel=0.1),), (pytest.approx(high, rel=0.1),))
    assert data.mean == pytest.approx([0.5, 0.5], abs=0.02)
    assert "in float32, on a logarithmic scale from " in data.describe_values()
    assert data.describe_values().endswith(" --log_values")


def test_a_logarithmic_scale_takes_its_ends_to_0_and_1_what_lies_below_to_0_and_nodata_to_the_mean():
    views = SingleView()
    views.configure((4, 4), [0.25], [0.5], Pixels((0.01,), (100.0,), "float32", log=True))
    images = torch.tensor([0.0, 0.001, 0.01, 1, 100, 10000, torch.nan]).view(1, 1, 1, 7)
    torch.testing.assert_close(views.scale(images).flatten(), torch.tensor([0.0, 0, 0, 0.5, 1, 1.5, 0.25]))
    assert views.filling == [pytest.approx(0.1)]


def test_settings_facts_and_the_export_say_that_numbers_are_logarithms(tmp_path):
    path = folder_of(tmp_path / "a", backscatter())
    first = opened(path, 2, log_values=True)
    again = opened(path, 2, log_values=True, **first.settings())
    assert (again.pixels, again.mean, again.measured) == (first.pixels, first.mean, None)
    assert Pixels.of(first.pixels.facts()) == first.pixels
    assert first.pixels.options()["log_values"]
    assert first.pixels.exported([0.5], [0.5])["pixels"]["log"]


def test_8_bit_colours_on_a_logarithmic_scale_are_measured_and_no_pictures(tmp_path):
    images = [np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8) for i in range(4)]
    data = opened(folder_of(tmp_path / "a", images), 3, log_values=True)
    assert (data.pixels.type, data.pixels.low, data.pixels.colours, data.plain) == ("uint8", (1.0,), False, False)
    assert data.pixels.exported(data.mean, data.std)["mean"] == data.mean


@pytest.mark.parametrize(
    ("images", "options", "told"),
    [
        (camera(kind=np.float32), {"value_range": "0,10"}, "above 0, not 0,10"),
        (camera(kind=np.float32), {"value_range": "per_file"}, "exclude each other"),
        ([-image for image in camera(kind=np.float32)], {}, "has no logarithm; read it without --log_values"),
        ([np.zeros_like(image) for image in camera()], {}, "no number lies above 0"),
    ],
)
def test_what_has_no_logarithm_is_refused_by_name(tmp_path, images, options, told):
    with pytest.raises(UserError, match=told):
        opened(folder_of(tmp_path / "a", images), 1, log_values=True, **options)

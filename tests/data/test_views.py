"""What becomes of a decoded image: a crop in the worker, floats on the device."""

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from mim.data.pixels import EIGHT_BIT
from mim.data.views import IMAGENET_MEAN, IMAGENET_STD, MultiCrop, SingleView, Views, _jitter
from mim.randomness import RowGenerator


def configured(size=(32, 48), **arguments):
    views = SingleView(**arguments)
    views.configure(size, IMAGENET_MEAN, IMAGENET_STD, EIGHT_BIT)
    return views


def image(height=60, width=80, channels=3):
    return torch.randint(256, (channels, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(60, 80), (20, 300), (300, 20), (8, 8), (1, 1), (32, 48)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_views_have_the_size_asked_for_and_stay_bytes(shape, channels):
    views, picture = configured(), image(*shape, channels)
    for view in [*views.crop(picture), views.center(picture)]:
        assert view.shape == (channels, 32, 48)
        assert view.dtype == torch.uint8


def test_a_crop_depends_on_the_global_generator_alone():
    picture, crops = image(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        crops.append(configured().crop(picture)[0])
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])


@pytest.mark.parametrize(("flip", "flipped"), [(0.0, False), (1.0, True)])
def test_flip_is_the_probability_of_a_flip(flip, flipped):
    picture = image(32, 48)
    (crop,) = configured(scale=(1.0, 1.0), ratio=(1.5, 1.5), flip=flip).crop(picture)
    assert torch.equal(crop, picture.flip(-1) if flipped else picture)


def test_scale_limits_the_area_of_a_crop():
    ramp = torch.arange(100).repeat(100, 1).to(torch.uint8)[None]  # its range tells the width of a crop
    views = configured((64, 64), scale=(0.25, 0.25), ratio=(1.0, 1.0))
    for _ in range(5):
        (crop,) = views.crop(ramp)
        assert 45 <= int(crop.max()) - int(crop.min()) <= 50


def test_the_center_draws_nothing():
    picture, before = image(), torch.get_rng_state()
    first = configured().center(picture)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(configured().center(picture), first)


def test_the_center_of_an_image_of_the_right_size_is_the_image():
    picture = image(32, 48)
    assert torch.equal(configured().center(picture), picture)


def test_the_center_keeps_proportions_and_cuts_both_ends_alike():
    ramp = torch.arange(200).repeat(100, 1).to(torch.uint8)[None]
    middle = configured((100, 100)).center(ramp)
    assert torch.equal(middle, ramp[..., 50:150])


def test_normalize_equals_torchvision():
    images = torch.stack([image(), image()])
    expected = F.normalize(images.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(configured().normalize(images), expected, rtol=0, atol=1e-6)


def test_normalize_takes_any_number_of_channels():
    views = SingleView()
    views.configure((8, 8), [0.1, 0.2, 0.3, 0.4, 0.5], [0.5] * 5, EIGHT_BIT)
    black = views.normalize(torch.zeros(2, 5, 8, 8, dtype=torch.uint8))
    torch.testing.assert_close(black[0, :, 0, 0], torch.tensor([-0.2, -0.4, -0.6, -0.8, -1.0]))


def test_every_view_is_normalised():
    views, batches = configured(), [torch.stack([image()]), torch.stack([image(16, 16)])]
    for finished, batch in zip(views(batches, RowGenerator(torch.arange(1))), batches, strict=True):
        assert torch.equal(finished, views.normalize(batch))


def test_statistics_are_not_part_of_a_checkpoint():
    assert configured().state_dict() == {}


def test_statistics_follow_the_last_configuration():
    views = configured()
    views.configure((16, 16), [0.5], [0.5], EIGHT_BIT)
    assert (views.size, views.mean.tolist()) == ((16, 16), [0.5])
    assert views.crop(image(channels=1))[0].shape == (1, 16, 16)


def test_a_kind_of_views_has_to_say_how_it_crops():
    with pytest.raises(NotImplementedError):
        Views().crop(image())


# Multi-crop ----------------------------------------------------------------------------------------------------------


def multi(**arguments):
    views = MultiCrop(**{"local_crops": 3, "local_size": 16} | arguments)
    views.configure((32, 32), [0.0] * 3, [1.0] * 3, EIGHT_BIT)
    return views


def rows(count, first=0):
    return RowGenerator.for_rows(0, first, count)


def batch(count=64, channels=3, size=32):
    return [torch.randint(256, (count, channels, side, side), dtype=torch.uint8) for side in (size, size, 16, 16, 16)]


def test_large_crops_come_first_and_small_ones_have_a_size_of_their_own():
    assert [tuple(view.shape) for view in multi().crop(image())] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3


def test_colours_of_an_image_depend_on_its_key_alone():
    views = batch(12)
    whole = multi()(views, rows(12))
    part = multi()([view[5:8] for view in views], rows(3, 5))
    for everything, some in zip(whole, part, strict=True):
        torch.testing.assert_close(some, everything[5:8])


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_finished_views_stay_in_range_for_any_number_of_channels(channels):
    views = multi()
    views.configure((32, 32), [0.0] * channels, [1.0] * channels, EIGHT_BIT)
    for view in views(batch(8, channels), rows(8)):
        assert view.isfinite().all()
        assert view.min() >= 0
        assert view.max() <= 1


def changed(before, after):
    return (after - before.float() / 255).abs().flatten(1).amax(1) > 1e-4


def test_probabilities_are_those_of_the_recipe(monkeypatch):
    monkeypatch.setattr("mim.data.views._STRENGTHS", (0.0, 0.0, 0.0, 0.0))
    views = batch(2000, size=16)
    finished = multi(blur=(1.0, 1.0))(views, rows(2000))
    grey = [((v[:, 0] - v[:, 1]).abs().flatten(1).amax(1) < 1e-5).float().mean().item() for v in finished]
    assert grey == pytest.approx([0.2] * 5, abs=0.03)
    touched = [changed(v, f).float().mean().item() for v, f in zip(views, finished, strict=True)]
    # Grey or blurred; the second view may be solarised, too.
    assert touched == pytest.approx([1.0, 1 - 0.8 * 0.9 * 0.8, 0.6, 0.6, 0.6], abs=0.035)


def test_the_jitter_is_torchvisions_in_any_order():
    pixels, numbers = torch.rand(1, 3, 8, 8), torch.rand(1, 4)
    shifts = ((2 * numbers - 1) * torch.tensor([0.4, 0.4, 0.2, 0.1]))[0].tolist()
    steps = [
        lambda x: F.adjust_brightness(x, 1 + shifts[0]),
        lambda x: F.adjust_contrast(x, 1 + shifts[1]),
        lambda x: F.adjust_saturation(x, 1 + shifts[2]),
        lambda x: F.adjust_hue(x, shifts[3]),
    ]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        expected, images = pixels, pixels.clone()
        for number in order:
            expected = steps[number](expected)
        _jitter(images, torch.tensor([True]), numbers, torch.tensor([order]))
        torch.testing.assert_close(images, expected, rtol=0, atol=2e-3)

"""What becomes of a decoded image: a crop in the worker, floats on the device."""

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from mim.data.views import IMAGENET_MEAN, IMAGENET_STD, SingleView, Views
from mim.randomness import RowGenerator


def configured(size=(32, 48), **arguments):
    views = SingleView(**arguments)
    views.configure(size, IMAGENET_MEAN, IMAGENET_STD)
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
    views.configure((8, 8), [0.1, 0.2, 0.3, 0.4, 0.5], [0.5] * 5)
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
    views.configure((16, 16), [0.5], [0.5])
    assert (views.size, views.mean.tolist()) == ((16, 16), [0.5])
    assert views.crop(image(channels=1))[0].shape == (1, 16, 16)


def test_a_kind_of_views_has_to_say_how_it_crops():
    with pytest.raises(NotImplementedError):
        Views().crop(image())

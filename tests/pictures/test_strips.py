import numpy as np
import pytest
import torch
from PIL import Image

from mim.encoder import Encoder
from mim.masking import AttentionMasking, RandomMasking
from mim.pictures.strips import (
    GAP,
    HEADER,
    HIDDEN,
    encoder_views,
    heat,
    label_colours,
    mark_hidden,
    masking_strip,
    pca_rgb,
    read_strip,
    save_strip,
    strip,
    to_rgb,
)

HALF, QUARTER = (0.5,) * 3, (0.25,) * 3


@pytest.fixture
def encoder():
    return Encoder("test_vit", img_size=32, patch_size=8)


def test_normalised_images_get_their_pixels_back():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    normalised = (pixels / 255 - torch.tensor(HALF).view(3, 1, 1)) / torch.tensor(QUARTER).view(3, 1, 1)
    assert torch.equal(to_rgb(normalised, HALF, QUARTER), pixels)


def test_values_outside_the_range_are_cut_and_not_wrapped():
    extremes = torch.tensor([-9.0, 9.0, float("nan")]).view(1, 3, 1, 1)
    assert to_rgb(extremes, (0.5,) * 3, (1.0,) * 3).flatten().tolist() == [0, 255, 0]


@pytest.mark.parametrize("channels", [1, 2])
def test_fewer_than_three_channels_show_the_first_as_grey(channels):
    images = torch.rand(1, channels, 2, 2)
    shown = to_rgb(images, (0.0,) * channels, (1.0,) * channels)
    assert torch.equal(shown[:, 0], (images[:, 0] * 255).round().byte())
    assert torch.equal(shown[:, 0], shown[:, 1])
    assert torch.equal(shown[:, 0], shown[:, 2])


def test_more_than_three_channels_show_the_first_three():
    images = torch.rand(1, 6, 2, 2)
    assert torch.equal(to_rgb(images, (0.0,) * 6, (1.0,) * 6), to_rgb(images[:, :3], (0.0,) * 3, (1.0,) * 3))


def test_heat_rises_in_brightness_and_ignores_scale_and_offset():
    values = torch.linspace(0, 1, 100).view(1, 10, 10)
    brightness = heat(values).float().mean(1).flatten()
    assert (brightness.diff() >= -2).all()
    assert brightness[-1] > brightness[0] + 100
    assert torch.equal(heat(values), heat(values * 4 - 2))


def test_equal_patches_share_a_colour_over_all_images_and_others_do_not():
    sky, grass = torch.randn(2, 16)
    features = torch.stack([torch.stack([sky, grass], 1), torch.stack([grass, sky], 1)])[:, :, None]  # (2, 16, 1, 2)
    colours = pca_rgb(features)
    assert torch.equal(colours[0, :, 0, 0], colours[1, :, 0, 1])
    assert (colours[0, :, 0, 0].int() - colours[0, :, 0, 1].int()).abs().max() > 200


def test_a_diverged_model_still_gives_a_picture():
    assert pca_rgb(torch.full((2, 8, 2, 2), float("nan"))).shape == (2, 3, 2, 2)
    assert heat(torch.full((2, 2, 2), float("nan"))).shape == (2, 3, 2, 2)


def test_a_model_without_class_token_shows_similarity_to_the_centre():
    encoder = Encoder("test_vit", img_size=32, patch_size=8, kwargs={"class_token": False, "global_pool": "avg"}).eval()
    views = encoder_views(torch.randn(2, 3, 32, 32), encoder)
    assert list(views) == ["similarity", "features"]
    assert views["similarity"].float().mean(1).flatten(1).argmax(1).tolist() == [10, 10]  # row 2, column 2 of 4 x 4


def test_a_strip_has_a_row_per_image_and_a_column_per_view(encoder):
    images = torch.randn(3, 3, 32, 32)
    picture = strip(images, {"hidden": images, "reconstruction": images}, encoder, HALF, QUARTER)
    assert picture.size == (GAP + 5 * (96 + GAP), HEADER + 3 * (96 + GAP))
    assert picture.mode == "RGBA"


def test_a_value_per_patch_is_drawn_as_heat(encoder, tmp_path):
    values = torch.randn(2, 4, 4)
    save_strip(strip(torch.randn(2, 3, 32, 32), {"error": values}, encoder, HALF, QUARTER), tmp_path / "s.png")
    corners = np.asarray(read_strip(tmp_path / "s.png")["error"][1])[::24, ::24]
    assert np.array_equal(corners, heat(values)[1].permute(1, 2, 0).numpy())


def test_a_saved_strip_gives_back_title_and_pixels_of_every_tile(encoder, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    save_strip(strip(images, {"mirrored": -images}, encoder, HALF, QUARTER), tmp_path / "epoch_001.png")
    tiles = read_strip(tmp_path / "epoch_001.png")
    assert list(tiles) == ["input", "mirrored", "attention", "features"]
    small = np.asarray(tiles["mirrored"][1])[::3, ::3]  # 32 pixels are enlarged three times
    assert np.array_equal(small, to_rgb(-images, HALF, QUARTER)[1].permute(1, 2, 0).numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_001.png"]


def test_a_png_of_somebody_else_has_no_tiles(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    assert read_strip(tmp_path / "photo.png") == {}


@pytest.mark.parametrize(("size", "tile"), [((32, 64), (96, 192)), ((96, 96), (96, 96)), ((448, 448), (224, 224))])
def test_tiles_are_neither_tiny_nor_huge(size, tile, tmp_path):
    width, height = size
    images = torch.randn(1, 3, height, width)
    encoder = Encoder("test_vit", img_size=(height, width), patch_size=32)
    save_strip(strip(images, {}, encoder, HALF, QUARTER), tmp_path / "s.png")
    assert read_strip(tmp_path / "s.png")["attention"][0].size == tile


def test_drawing_leaves_no_gradient_and_the_encoder_in_its_mode(encoder):
    encoder.train()
    strip(torch.randn(1, 3, 32, 32), {}, encoder, HALF, QUARTER)
    assert encoder.training
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_whole_numbers_have_a_colour_each_whatever_stands_beside_them():
    colours = label_colours(torch.tensor([[[0, 1], [2, 1]]]))
    assert colours.shape == (1, 3, 2, 2)
    assert torch.equal(colours[..., 0, 1], colours[..., 1, 1])
    assert not torch.equal(colours[..., 0, 0], colours[..., 1, 0])
    assert torch.equal(label_colours(torch.tensor([[[1]]]))[..., 0, 0], colours[..., 0, 1])


def test_policies_are_shown_side_by_side(tmp_path):
    encoder, images = Encoder("test_vit", 32, 8).eval(), torch.randn(2, 3, 32, 32)
    policies = {"high": AttentionMasking(unmasked_share=0.0), "random": RandomMasking(0.5)}
    save_strip(masking_strip(images, encoder, policies, [0.5] * 3, [0.25] * 3), tmp_path / "masks.png")
    tiles = read_strip(tmp_path / "masks.png")
    assert list(tiles) == ["input", "attention", "high", "random"]
    assert [len(column) for column in tiles.values()] == [2] * 4


def test_hidden_patches_have_a_colour_of_their_own_in_every_column_that_hides(encoder):
    images, mask = torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.bool)
    images[..., :16] = 1.0
    mask[0, 0] = True  # the first patch of 4 x 4
    hidden = images.clone()
    hidden[..., :8, :8] = 0.0
    assert mark_hidden(to_rgb(images, HALF, QUARTER), mask.view(1, 4, 4))[0, :, 7, 7].tolist() == list(HIDDEN)
    picture = strip(images, {"hidden": hidden}, encoder, HALF, QUARTER)
    column = GAP + 96 + GAP  # of the second tile
    assert picture.getpixel((column + 3, HEADER + 3))[:3] == HIDDEN
    assert picture.getpixel((column + 90, HEADER + 3))[:3] != HIDDEN

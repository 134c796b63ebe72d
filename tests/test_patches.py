import numpy as np
import pytest
import torch

from mim.patches import (
    feature_spread,
    gather_tokens,
    patch_grid,
    patchify,
    pixel_targets,
    replace_patches,
    some_of,
    unpatchify,
    visible_indices,
)


def test_a_patch_runs_over_rows_then_columns_then_channels():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    for row, column, i, j, channel in [(0, 0, 0, 0, 0), (0, 2, 1, 0, 2), (1, 1, 0, 1, 1)]:
        expected = images[1, channel, row * 2 + i, column * 2 + j]
        assert patches[1, row * 3 + column, (i * 2 + j) * 3 + channel] == expected


@pytest.mark.parametrize(("size", "patch_size", "channels"), [((4, 6), 2, 3), ((6, 4), (3, 2), 1), ((8, 8), 8, 5)])
def test_unpatchify_inverts_patchify(size, patch_size, channels):
    images = torch.randn(2, channels, *size)
    patches = patchify(images, patch_size)
    assert torch.equal(unpatchify(patches, patch_grid(images, patch_size), patch_size, channels), images)


def test_chosen_patches_are_the_same_as_all_patches_gathered():
    images, indices = torch.randn(2, 3, 8, 12), torch.tensor([[5, 0], [1, 2]])
    assert torch.equal(patchify(images, 4, indices), gather_tokens(patchify(images, 4), indices))


def test_channels_last_images_are_cut_alike():
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(patchify(images.to(memory_format=torch.channels_last), 4), patchify(images, 4))


@pytest.mark.parametrize("new", [7.0, torch.arange(2 * 2 * 18.0).view(2, 2, 18)])
def test_replaced_patches_are_those_named_and_no_others(new):
    images, indices = torch.randn(2, 3, 6, 8), torch.tensor([[5, 0], [1, 2]])
    patches = patchify(replace_patches(images, (3, 2), indices, new), (3, 2))
    assert torch.equal(gather_tokens(patches, indices), torch.as_tensor(new).expand(2, 2, 18))
    others = torch.ones(2, 8, dtype=torch.bool).scatter(1, indices, False)
    assert torch.equal(patches[others], patchify(images, (3, 2))[others])


def test_an_indivisible_image_is_refused():
    with pytest.raises(ValueError, match=r"8 x 10 pixels .* patches of 4 x 4"):
        patchify(torch.zeros(1, 3, 8, 10), 4)


def test_targets_are_standardised_with_the_unbiased_variance():
    images = torch.randn(2, 3, 4, 8)
    patches = patchify(images, 4).double().numpy()
    expected = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(pixel_targets(images, 4).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_patch_of_two_halves_has_the_deviation_of_numpy():
    images = torch.zeros(1, 1, 4, 4)
    images[..., 2:] = 1
    expected = 0.5 / np.sqrt(np.var([0] * 8 + [1] * 8, ddof=1) + 1e-6)
    assert pixel_targets(images, 4).abs().allclose(torch.tensor(expected, dtype=torch.float32))


def test_a_constant_patch_has_the_target_zero():
    assert torch.equal(pixel_targets(torch.full((1, 3, 4, 4), 0.7), 4), torch.zeros(1, 1, 48))


def test_visible_indices_keep_raster_order():
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    assert visible_indices(mask).tolist() == [[1, 3], [0, 3]]
    assert visible_indices(~mask, 2).tolist() == [[0, 2], [1, 2]]


def test_rows_that_hide_different_numbers_are_refused():
    with pytest.raises(ValueError, match="from 1 to 2 patches"):
        visible_indices(torch.tensor([[True, True, False], [True, False, False]]))


def test_visible_indices_read_nothing_from_the_device_if_the_count_is_given():
    mask = torch.ones(2, 4, dtype=torch.bool, device="meta")
    assert visible_indices(mask, 3).shape == (2, 3)


def test_gathered_tokens_are_those_named():
    tokens = torch.arange(8.0).view(2, 4, 1)
    assert gather_tokens(tokens, torch.tensor([[3, 0], [1, 2]]))[..., 0].tolist() == [[3, 0], [5, 6]]


def test_feature_spread_is_0_for_equal_features_and_1_for_standard_ones():
    assert feature_spread(torch.ones(3, 5, 8)) == 0
    assert feature_spread(torch.randn(100, 100, 8)).item() == pytest.approx(1, abs=0.02)


def test_some_of_the_places_are_those_with_the_smallest_numbers_in_their_order():
    places = torch.tensor([[1, 4, 6, 9], [0, 2, 3, 5]])
    numbers = torch.tensor([[0.5, 0.1, 0.9, 0.2], [0.3, 0.2, 0.1, 0.4]])
    assert some_of(places, 2, numbers).tolist() == [[4, 9], [2, 3]]

import math

import pytest
import torch
from torch.nn import functional as F

from mim.encoder import Encoder
from mim.targets import HOGTarget


def slow_histogram(image, size, place):
    """One patch of one image ``(C, H, W)``, pixel by pixel."""
    channels, height, width = image.shape
    rows, columns = size
    top, left = place[0] * rows, place[1] * columns

    def at(c, i, j):
        i, j = (abs(k) if k < n else 2 * n - 2 - k for k, n in ((i, height), (j, width)))  # reflected at the border
        return image[c, i, j]

    cells = torch.zeros(2, 2, channels, 9)
    for i in range(rows):
        for j in range(columns):
            away = ((2 * i - rows + 1) / rows) ** 2 + ((2 * j - columns + 1) / columns) ** 2
            weight = math.exp(-away / 2)
            for c in range(channels):
                y, x = top + i, left + j
                across = sum(k * (at(c, y + d, x - 1) - at(c, y + d, x + 1)) for d, k in ((-1, 1), (0, 2), (1, 1)))
                down = sum(k * (at(c, y - 1, x + d) - at(c, y + 1, x + d)) for d, k in ((-1, 1), (0, 2), (1, 1)))
                number = math.floor(math.atan2(across, down) / math.pi * 9) % 9
                cells[2 * i // rows, 2 * j // columns, c, number] += weight * math.hypot(across, down)
    lengths = cells.norm(dim=-1, keepdim=True)
    return (cells / lengths.clamp(min=1e-12)).flatten()


@pytest.mark.parametrize(("channels", "size"), [(3, (16, 16)), (1, (8, 8)), (2, (4, 6))])
def test_histograms_equal_a_slow_loop(channels, size):
    images = torch.randn(2, channels, 2 * size[0], 3 * size[1])
    indices = torch.tensor([[0, 4], [5, 2]])
    found = HOGTarget()(images, (2, 3), indices)
    for image in range(2):
        for number, patch in enumerate(indices[image].tolist()):
            expected = slow_histogram(images[image].double(), size, divmod(patch, 3))
            torch.testing.assert_close(found[image, number], expected.float(), atol=1e-5, rtol=1e-4)


def test_a_patch_of_16_px_in_three_channels_has_108_values_of_which_nine_have_length_1():
    encoder = Encoder("test_vit", 32, 16)
    target = HOGTarget()(torch.randn(1, 3, 32, 32), (2, 2), torch.arange(4)[None])
    assert HOGTarget().dim(encoder) == target.shape[2] == 108
    torch.testing.assert_close(target.view(4, 12, 9).norm(dim=-1), torch.ones(4, 12))


def test_opposite_edges_share_a_bin_and_others_do_not():
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    middle = torch.tensor([[5]])  # of patches of 8, away from the border
    rising, falling, upright = (HOGTarget()(image, (4, 4), middle) for image in (ramp, -ramp, ramp.transpose(2, 3)))
    assert torch.equal(rising, falling)
    assert rising.view(4, 9).argmax(1).unique().numel() == 1
    assert rising.argmax() != upright.argmax()


def test_brightness_and_contrast_of_the_image_do_not_matter():
    images, everything = torch.randn(1, 3, 16, 16), torch.arange(4)[None]
    changed = HOGTarget()(3 * images + 1, (2, 2), everything)
    torch.testing.assert_close(changed, HOGTarget()(images, (2, 2), everything), atol=1e-3, rtol=1e-3)


def test_a_flat_patch_has_no_edges_and_a_finite_error():
    target = HOGTarget()(torch.ones(1, 3, 16, 16), (2, 2), torch.arange(4)[None])
    assert not target.any()
    assert HOGTarget().loss(torch.ones(1, 4, 108), target) == 1


def test_the_error_is_the_mean_square_over_values():
    prediction, target = torch.randn(2, 3, 36), torch.randn(2, 3, 36)
    torch.testing.assert_close(HOGTarget().loss(prediction, target), F.mse_loss(prediction, target))


def test_odd_patches_are_refused():
    with pytest.raises(ValueError, match="patches of 7 x 7 px"):
        HOGTarget().dim(Encoder("vit_tiny_patch16_224", 28, 7, kwargs={"embed_dim": 16, "depth": 1, "num_heads": 2}))


def test_what_was_not_measured_moves_neither_targets_that_count_nor_the_loss():
    images, valid = torch.randn(1, 3, 32, 32), torch.ones(1, 1, 32, 32, dtype=torch.bool)
    valid[..., 4:20, 4:8] = False  # all of the cell's neighbours, a part of three patches of 8 px
    everything, target = torch.arange(16)[None], HOGTarget()
    losses, counted = [], []
    for number in (0.0, 5.0):
        filled = torch.where(valid, images, number)
        values, weights = target.measured(filled, (4, 4), everything, valid)
        losses.append(target.loss(torch.ones_like(values), values, weights))
        counted.append(values * weights)
    torch.testing.assert_close(counted[0], counted[1])
    torch.testing.assert_close(*losses)
    cells = weights.view(16, 4, 27)
    assert cells[1, :, 0].tolist() == [0, 1, 0, 1]  # its left half is beside the gap
    assert not cells[0].any()
    assert cells[15].all()


def test_strokes_run_along_an_edge_and_change_in_hidden_patches_alone():
    image = torch.zeros(1, 1, 32, 32)
    image[..., 12:] = 1.0  # an upright edge in the second column of patches
    hidden, target = torch.tensor([[1]]), HOGTarget()
    shown = target.pictures(torch.zeros(1, 1, 36), image, (4, 4), hidden)
    edges, imagined = shown["edges"], shown["imagined edges"]
    assert edges.shape == (1, 64, 64)
    along, across = edges[0, 18:30, 16:32].amax(1), edges[0, 16:32, 16:32].mean(0)
    assert along.min() > 0.49  # bright in every row: half a pixel away from the middle
    assert across.max() > 3 * across.min()
    assert imagined[0, :16, 16:32].max() == 0
    assert torch.equal(imagined[0, 16:], edges[0, 16:])

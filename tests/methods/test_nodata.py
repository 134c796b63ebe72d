"""Pixels that were not measured: no part of a target, whatever stands there."""

import pytest
import torch

from mim.encoder import Encoder
from mim.masking import RandomMasking
from mim.methods import MAE
from mim.patches import measured_values, patch_statistics, patchify, pixel_targets
from mim.targets import PixelTarget


def image_and_mask():
    images = torch.randn(2, 3, 16, 16)
    valid = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    valid[0, :, :3, :] = False  # of the patches in the first row three eighths of the pixels
    valid[1, :, :6, :8] = False  # of the first patch three quarters
    return images, valid


def test_a_patch_that_is_mostly_nodata_has_no_value_that_counts():
    _, valid = image_and_mask()
    weights = measured_values(valid, 8, 3)
    assert weights.sum(-1).tolist() == [[120, 120, 192, 192], [0, 192, 192, 192]]


def test_statistics_are_those_of_measured_values_alone():
    images, valid = image_and_mask()
    patches, weights = patchify(images, 8), measured_values(valid, 8, 3)
    mean, std = patch_statistics(patches, weights)
    kept = patches[0, 0][weights[0, 0] > 0]
    torch.testing.assert_close(mean[0, 0, 0], kept.mean())
    torch.testing.assert_close(std[0, 0, 0], (kept.var() + 1e-6).sqrt())


def test_without_nodata_targets_and_errors_are_as_ever():
    images, prediction = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 192)
    target, everything = PixelTarget(standardise=True), torch.arange(4).expand(2, -1)
    weights = target.weights(torch.ones(2, 1, 16, 16, dtype=torch.bool), images, (2, 2), everything)
    torch.testing.assert_close(target(images, (2, 2), everything, weights), pixel_targets(images, 8))
    plain = target.error(prediction, pixel_targets(images, 8))
    torch.testing.assert_close(target.error(prediction, pixel_targets(images, 8), weights), plain)
    torch.testing.assert_close(target.mean_error(plain, weights), plain.mean())


@pytest.mark.parametrize("standardise", [True, False])
def test_the_loss_does_not_see_what_stands_where_nothing_was_measured(standardise):
    images, valid = image_and_mask()
    method = MAE(
        Encoder("test_vit", img_size=16, patch_size=8, positions="sincos"),
        RandomMasking(0.5),
        decoder_width=32,
        decoder_depth=1,
        decoder_heads=2,
        target=PixelTarget(standardise),
    )
    method.log = lambda *_: None
    method.reconstruct = lambda images, mask, generator: (torch.ones(2, 4, 192), torch.arange(4).expand(2, -1))
    losses = []
    for number in (0.0, 5.0):
        filled = torch.where(valid, images, number)
        losses.append(method.training_step(([filled], torch.zeros(2), [valid]), 0))
    assert torch.equal(*losses)
    target, everything = method.target, torch.arange(4).expand(2, -1)
    weights = target.weights(valid, images, (2, 2), everything)
    patches = target(images, (2, 2), everything, weights)
    rows = [
        (1 - patches[i, n][weights[i, n] > 0]).square().mean()
        for i in range(2)
        for n in range(4)
        if weights[i, n].any()
    ]
    torch.testing.assert_close(losses[0], torch.stack(rows).mean())
    assert len(rows) == 7

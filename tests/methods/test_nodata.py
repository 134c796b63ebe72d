"""Pixels that were not measured: no part of a target, whatever stands there."""

import pytest
import torch
import torch.nn.functional as F

from mim.encoder import Encoder
from mim.masking import AttentionMasking, BlockMasking, HardPatchMasking, RandomMasking
from mim.methods import IBOT, MAE
from mim.methods.base import hidden_last
from mim.methods.hpm import hidden_pairs, ranking_loss, regression_loss
from mim.methods.ibot import HeadConfig
from mim.patches import (
    hidden_places,
    measured_mean,
    measured_patches,
    measured_values,
    measured_weights,
    patch_statistics,
    patchify,
    pixel_targets,
)
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


# Methods that choose patches by scores, or compare them -----------------------------------------------------------


def corner():
    """A patch of four, in one of two images, that is mostly nodata."""
    valid = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    valid[1, :, :6, :8] = False
    return valid


def test_a_patch_that_is_mostly_nodata_is_called_so():
    assert measured_patches(corner(), 8).tolist() == [[True] * 4, [False, True, True, True]]


@pytest.mark.parametrize("mode", ["high", "low", "hint"])
def test_patches_without_measurement_are_the_last_that_attention_hides(mode):
    encoder = Encoder("test_vit", img_size=16, patch_size=8)
    scores = (
        torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2).flip(1) if mode != "low" else torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2)
    )
    masking = AttentionMasking(mode, low=0.75, high=0.75, unmasked_share=0.0, show_max=0.0)
    mask = masking(2, (2, 2), scores=hidden_last(scores, corner(), encoder))
    assert mask.tolist() == [[True, True, True, False], [False, True, True, True]]


def test_patches_without_measurement_are_never_the_hardest():
    encoder = Encoder("test_vit", img_size=16, patch_size=8)
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 2)
    masking = HardPatchMasking(0.5, start=1.0, end=1.0)
    mask = masking(2, (2, 2), scores=hidden_last(scores, corner(), encoder))
    assert mask.tolist() == [[True, True, False, False], [False, True, True, False]]


def test_weights_of_hidden_patches_are_shared_by_those_that_were_measured():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    image, patch, weight = hidden_places(mask, 3)
    measured = torch.tensor([[False, True, True, True], [False, True, True, True]])[image, patch]
    weights = measured_weights(weight, image, measured, 2)
    assert weights.tolist() == [0.0, 0.5, 0.5, 0.0]


def test_the_middle_of_patches_is_that_of_measured_ones():
    patches = torch.arange(16.0).view(2, 4, 2)
    measured = torch.tensor([[True, False, False, False], [False, True, False, False]])
    assert measured_mean(patches, measured).tolist() == [5.0, 6.0]


def test_pairs_with_a_patch_that_is_no_target_do_not_count():
    difficulty, error = torch.randn(3, 5), torch.rand(3, 5)
    counted = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]).expand(3, -1)
    kept = [0, 2, 3, 4]
    gap, order = hidden_pairs(difficulty, error, counted)
    pairs = [
        F.softplus(-(error[i, b] - error[i, a]).sign() * (difficulty[i, b] - difficulty[i, a]))
        for i in range(3)
        for a in kept
        for b in kept
        if a < b
    ]
    torch.testing.assert_close(ranking_loss(gap, order), torch.stack(pairs).mean())
    own = [
        (difficulty[i, kept] - (error[i, kept] - error[i, kept].mean()) / (error[i, kept].var() + 1e-6).sqrt())
        for i in range(3)
    ]
    expected = torch.stack(own).square().mean()
    torch.testing.assert_close(regression_loss(difficulty, error, counted), expected)


def test_ibot_has_no_patch_loss_where_nothing_was_measured():
    encoder = Encoder("test_vit", img_size=16, patch_size=8)
    method = IBOT(encoder, BlockMasking(0.3, 0.5, 0.0), HeadConfig(16, 8, 4))
    method.setup("fit")
    logged = {}
    method.log_dict = logged.update
    views, nothing = [torch.zeros(2, 3, 16, 16)] * 2, [torch.zeros(2, 1, 16, 16, dtype=torch.bool)] * 2
    loss = method.training_step((views, torch.zeros(2), nothing), 0)
    assert logged["train/patch"] == 0
    assert loss == logged["train/class"]
    assert loss.isfinite()

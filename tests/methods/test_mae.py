import copy
import math

import pytest
import timm
import torch
from jsonargparse import ArgumentParser
from torch import nn

from mim.encoder import Encoder
from mim.masking import BlockMasking, RandomMasking
from mim.methods import MAE, Method
from mim.patches import patchify, pixel_targets, unpatchify
from mim.targets import PixelTarget, Target

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def build(ratio=0.75, standardise=True, **encoder):
    arguments = {"img_size": 32, "patch_size": 8, "positions": "sincos", "kwargs": KWARGS} | encoder
    student = Encoder("vit_tiny_patch16_224", **arguments)
    method = MAE(student, RandomMasking(ratio), PixelTarget(standardise), 16, 1, 2)
    method.log = lambda *_, **__: None
    return method


def step(method, images):
    return method.training_step(([images], torch.zeros(len(images))), 0)


def mask_of(method, images):
    """The mask that ``step`` draws."""
    return method.masking(len(images), method.encoder.grid, generator=method.row_generator(len(images), 0))


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("encoder", [{}, {"img_size": (16, 32)}, {"in_chans": 5}])
def test_the_loss_equals_a_slow_loop(standardise, encoder):
    method = build(standardise=standardise, **encoder)
    images = torch.randn(3, method.encoder.in_chans, *method.encoder.img_size)
    mask = mask_of(method, images)
    prediction = method.decoder(method.encoder(images, mask), mask)
    patches, total = patchify(images, 8), 0.0
    for image, patch in mask.nonzero().tolist():
        target = patches[image, patch]
        if standardise:
            target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
        total += ((prediction[image, patch] - target) ** 2).mean().item()
    assert step(method, images).item() == pytest.approx(total / mask.sum().item(), rel=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_every_trainable_parameter_gets_a_gradient(images, kwargs):
    method = build(kwargs=KWARGS | kwargs)
    step(method, images).backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_twenty_steps_on_one_batch_lower_the_loss_and_keep_positions(images):
    method = build()
    optimizer = torch.optim.AdamW((p for p in method.parameters() if p.requires_grad), lr=3e-3)
    tables = copy.deepcopy([method.encoder.vit.pos_embed, method.decoder.fill.positions])
    losses = []
    for _ in range(20):
        losses.append(loss := step(method, images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    for table, before in zip([method.encoder.vit.pos_embed, method.decoder.fill.positions], tables, strict=True):
        assert torch.equal(table, before)
        assert table.grad is None


def test_visible_pixels_do_not_enter_the_loss_but_through_the_prediction(images):
    method = build()
    mask = mask_of(method, images)
    _, hidden = method.reconstruct(images, mask)
    area = mask[..., None].expand(-1, -1, 192).contiguous()
    repainted = torch.where(unpatchify(area, (4, 4), 8), images, images + 1)
    assert torch.equal(method.target(repainted, (4, 4), hidden), method.target(images, (4, 4), hidden))


class Oracle(nn.Module):
    """Predicts fixed values for hidden patches and nonsense for visible ones."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, latent, mask, indices):
        nonsense = torch.where(mask[..., None], self.values, 1e6)
        return nonsense.gather(1, indices[..., None].expand(-1, -1, self.values.shape[2]))


def test_the_loss_is_zero_when_hidden_targets_are_predicted_whatever_the_rest(images):
    method = build()
    method.decoder = Oracle(pixel_targets(images, 8))
    assert step(method, images) == 0


def test_predicting_zero_costs_the_variance_of_standardised_pixels():
    method = build(patch_size=16)
    method.decoder = Oracle(torch.zeros(4, 4, 768))
    loss = step(method, torch.randn(4, 3, 32, 32))
    assert loss.item() == pytest.approx(767 / 768, abs=1e-5)


def test_a_step_reads_nothing_back_from_the_device(images):
    method = build().to("meta")
    step(method, images.to("meta")).backward()
    assert method.encoder.vit.patch_embed.proj.weight.grad is not None


def test_constant_patches_have_a_finite_loss_and_gradient():
    method = build()
    step(method, torch.full((2, 3, 32, 32), 0.5)).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_accumulated_micro_batches_give_the_gradient_of_the_batch(images):
    method = build()
    masks = mask_of(method, images)
    loss = nn.functional.mse_loss

    def gradient(parts):
        method.zero_grad()
        for part in parts:
            prediction, hidden = method.reconstruct(images[part], masks[part])
            (loss(prediction, method.target(images[part], (4, 4), hidden)) / len(parts)).backward()
        return method.encoder.vit.blocks[0].attn.qkv.weight.grad.clone()

    torch.testing.assert_close(gradient([slice(0, 2), slice(2, 4)]), gradient([slice(0, 4)]), rtol=1e-4, atol=1e-6)


def test_masks_change_from_step_to_step_and_from_rank_to_rank(images, monkeypatch):
    method = build()
    masks = [mask_of(method, images)]
    monkeypatch.setattr(MAE, "global_step", 1)
    masks.append(mask_of(method, images))
    monkeypatch.setattr(method, "first_row", lambda *_: len(images))
    masks.append(mask_of(method, images))
    assert len(torch.cat(masks).unique(dim=0)) == 3 * len(images)


def test_tokens_decay_as_in_the_reference_but_biases_norms_and_positions_do_not():
    method = build()
    names = {id(p): name for name, p in method.named_parameters()}
    decayed, free = set(), set()
    for group in method.configure_optimizers().param_groups:
        (decayed if group["weight_decay"] else free).update(names[id(p)] for p in group["params"])
    assert {"encoder.vit.cls_token", "decoder.fill.mask_token", "decoder.trunk.predict.weight"} <= decayed
    assert {"encoder.vit.norm.weight", "encoder.vit.patch_embed.proj.bias"} <= free
    assert not any("pos" in name for name in decayed | free)
    assert all(not name.endswith("bias") for name in decayed)


def test_weights_start_as_in_the_reference():
    torch.manual_seed(0)
    method = build(patch_size=16, kwargs={"embed_dim": 192, "depth": 1, "num_heads": 3})
    vit = method.encoder.vit
    bounds = {
        vit.blocks[0].attn.qkv.weight: math.sqrt(6 / (4 * 192)),
        vit.patch_embed.proj.weight: math.sqrt(6 / (192 + 768)),
        vit.patch_embed.proj.bias: 1 / math.sqrt(768),
        method.decoder.trunk.predict.weight: math.sqrt(6 / (16 + 768)),
    }
    for weight, bound in bounds.items():
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.03)
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert method.decoder.fill.mask_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert not vit.blocks[0].attn.qkv.bias.any()


def test_pretrained_weights_are_kept(monkeypatch):
    encoder = Encoder("vit_tiny_patch16_224", 32, 8, kwargs=KWARGS)
    encoder.pretrained = True
    before = copy.deepcopy(encoder.state_dict())
    MAE(encoder, RandomMasking(), decoder_width=16, decoder_depth=1, decoder_heads=2)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_the_backbone_in_timm_gives_the_tokens_of_the_encoder_with_nothing_hidden(images):
    method = build(ratio=0.0).eval()
    twin = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0, **KWARGS).eval()
    twin.load_state_dict(method.backbone.state_dict())
    tokens = method.encoder(images, mask_of(method, images))
    torch.testing.assert_close(tokens, twin.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("standardise", [True, False])
def test_pictures_show_true_pixels_where_visible_and_predictions_where_hidden(images, standardise):
    method = build(standardise=standardise).eval()
    method.decoder = Oracle(pixel_targets(images, 8) if standardise else patchify(images, 8))
    pictures = method.visualize(images)
    grey = patchify(pictures["hidden"], 8).eq(0).all(2)
    assert grey.sum(1).tolist() == [12] * 4
    kept = patchify(pictures["hidden"], 8)[~grey]
    assert torch.equal(kept, patchify(images, 8)[~grey])
    torch.testing.assert_close(pictures["reconstruction"], images, rtol=1e-4, atol=1e-4)


def test_pictures_use_the_same_masks_every_time(images):
    method = build()
    first = method.visualize(images)["hidden"]
    torch.rand(3)
    assert torch.equal(method.visualize(images)["hidden"], first)


class Guided(RandomMasking):
    guided = True


@pytest.mark.parametrize("masking", [BlockMasking(), Guided()])
def test_a_policy_that_mae_cannot_serve_is_refused(masking):
    with pytest.raises(ValueError, match=f"not {type(masking).__name__}"):
        MAE(Encoder("test_vit", 32), masking)


class Brightness(Target):
    """One value per patch, which is no picture."""

    def dim(self, encoder):
        return 1

    def forward(self, images, grid, indices):
        return patchify(images, 8).mean(2).gather(1, indices)[..., None]

    def error(self, prediction, target):
        return (prediction - target).abs()[..., 0]


def test_any_target_can_be_predicted_and_one_without_pixels_is_not_shown(images):
    encoder = Encoder("vit_tiny_patch16_224", 32, 8, positions="sincos", kwargs=KWARGS)
    method = MAE(encoder, RandomMasking(), Brightness(), 16, 1, 2)
    method.log = lambda *_: None
    mask = mask_of(method, images)
    prediction, hidden = method.reconstruct(images, mask)
    expected = (prediction[..., 0] - patchify(images, 8).mean(2).gather(1, hidden)).abs().mean()
    torch.testing.assert_close(step(method, images), expected)
    assert list(method.visualize(images)) == ["hidden"]


def test_without_a_target_pixels_are_predicted_standardised_as_in_the_released_models():
    encoder = Encoder("vit_tiny_patch16_224", 32, 8, positions="sincos", kwargs=KWARGS)
    assert MAE(encoder, RandomMasking(), decoder_width=16, decoder_heads=2).target.standardise


def test_a_config_file_builds_mae():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Method, "model")
    encoder = {"model": "test_vit", "img_size": [32, 64], "patch_size": 8, "positions": "sincos"}
    masking = {"class_path": "RandomMasking", "init_args": {"ratio": 0.5}}
    settings = {"encoder": encoder, "masking": masking, "decoder_width": 16, "decoder_heads": 2, "decoder_depth": 1}
    config = parser.parse_object({"model": {"class_path": "MAE", "init_args": settings}})
    method = parser.instantiate(config).model
    assert isinstance(method, MAE)
    assert method.encoder.grid == (4, 8)
    assert method.masking.ratio == 0.5

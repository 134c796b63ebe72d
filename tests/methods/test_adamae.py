import copy

import pytest
import torch

from mim.encoder import Encoder
from mim.masking import AttentionMasking, RandomMasking, SampledMasking
from mim.methods import MAE, AdaMAE
from mim.methods.adamae import SamplerConfig, health, sampling_loss
from mim.patches import patchify, unpatchify
from mim.targets import HOGTarget, PixelTarget

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}
DINOV3 = "vit_small_patch16_dinov3"
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def build(sampler=None, model="vit_tiny_patch16_224", target=None, **encoder):
    arguments = {"img_size": 32, "patch_size": 8, "positions": "sincos", "kwargs": KWARGS} | encoder
    method = AdaMAE(
        Encoder(model, **arguments), SampledMasking(0.75), target, sampler or SamplerConfig(heads=2), **DECODER
    )
    method.log = method.log_dict = lambda *_, **__: None
    return method


def step(method, images):
    return method.training_step(([images], torch.zeros(len(images))), 0)


def mask_of(method, images):
    """The mask that ``step`` draws."""
    return method.draw(method.sample(images), method.row_generator(len(images), 0))


def gradients(loss, part):
    found = torch.autograd.grad(loss, [p for p in part.parameters() if p.requires_grad], allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize("settings", [{}, {"img_size": (16, 32)}, {"in_chans": 5}, {"model": DINOV3}], ids=str)
def test_the_loss_equals_a_slow_loop(settings):
    method = build(SamplerConfig(weight=0.5, heads=2), **settings)
    images = torch.randn(3, method.encoder.in_chans, *method.encoder.img_size)
    mask, share = mask_of(method, images), method.sampler(method.encoder.embed(images)).softmax(dim=1)
    prediction = method.decoder(method.encoder(images, mask), mask)
    patches, errors, rewards = patchify(images, 8), [], []
    for image, patch in mask.nonzero().tolist():
        target = patches[image, patch]
        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        errors.append(((prediction[image, patch] - target) ** 2).mean())
        rewards.append(-share[image, patch].log() * errors[-1].detach())
    expected = torch.stack(errors).mean() + 0.5 * torch.stack(rewards).mean()
    torch.testing.assert_close(step(method, images), expected)


@pytest.mark.parametrize("settings", [{}, {"model": DINOV3}, {"target": HOGTarget()}], ids=["plain", "rotary", "hog"])
def test_every_trainable_parameter_gets_a_gradient(images, settings):
    method = build(**settings)
    step(method, images).backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_the_samplers_loss_moves_the_sampler_alone_and_the_reconstruction_everything_else(images):
    method = build()
    log_share = method.sample(images)
    mask = method.draw(log_share, method.row_generator(4, 0))
    prediction, hidden = method.reconstruct(images, mask)
    error = method.target.error(prediction, method.target(images, (4, 4), hidden))
    sampling = sampling_loss(log_share.gather(1, hidden), error.detach())
    assert all(gradient.any() for gradient in gradients(sampling, method.sampler))
    assert not torch.autograd.grad(sampling, list(method.decoder.parameters()), retain_graph=True, allow_unused=True)[0]
    method.zero_grad()
    error.mean().backward()
    assert all(parameter.grad is None for parameter in method.sampler.parameters())


@pytest.mark.parametrize("detached", [True, False])
def test_the_sampler_moves_the_patch_embedding_only_if_its_input_is_not_detached(images, detached):
    method = build(SamplerConfig(heads=2, detach_input=detached))
    method.sample(images)[:, 0].sum().backward()
    assert (method.encoder.vit.patch_embed.proj.weight.grad is None) == detached
    assert all(parameter.grad is None for parameter in method.encoder.vit.blocks.parameters())


def test_without_weight_the_step_is_maes_with_the_same_masks(images):
    method = build(SamplerConfig(weight=0.0, heads=2))
    mae = MAE(method.encoder, RandomMasking(0.75), **DECODER)
    mae.decoder, mae.log = method.decoder, lambda *_, **__: None
    mask = mask_of(method, images)
    mae.draw = lambda *_: mask
    torch.testing.assert_close(step(method, images), step(mae, images))


def test_hidden_pixels_reach_the_loss_through_the_masks_alone(images):
    method = build().eval()
    mask = mask_of(method, images)
    area = unpatchify(mask[..., None].expand(-1, -1, 192).contiguous(), (4, 4), 8)
    repainted = torch.where(area, images + 1, images)
    assert torch.equal(method.reconstruct(repainted, mask)[0], method.reconstruct(images, mask)[0])


def test_probabilities_grow_towards_the_errors_where_those_stand_still():
    torch.manual_seed(0)
    error = torch.linspace(0.2, 2.0, 16)
    scores = torch.zeros(16, requires_grad=True)
    optimizer, policy = torch.optim.SGD([scores], lr=0.5), SampledMasking(0.75)
    for _ in range(1500):
        log_share = scores.log_softmax(0).expand(64, -1)
        hidden = (~(~policy(64, (4, 4), scores=-log_share))).nonzero()[:, 1].view(64, 12)
        optimizer.zero_grad()
        sampling_loss(log_share.gather(1, hidden), error[hidden]).backward()
        optimizer.step()
    share = scores.softmax(0).detach()
    assert torch.corrcoef(torch.stack([share, error]))[0, 1] > 0.97


def test_masks_are_a_function_of_seed_step_and_row(images, monkeypatch):
    method = build()
    whole = mask_of(method, images)
    monkeypatch.setattr(method, "first_row", lambda *_: 2)
    assert torch.equal(mask_of(method, images[2:]), whole[2:])
    monkeypatch.setattr(AdaMAE, "global_step", 1)
    assert not torch.equal(mask_of(method, images[2:]), whole[2:])


def test_a_sampler_that_is_not_finite_skips_the_step(images):
    method = build()
    with torch.no_grad():
        method.sampler.score.bias.fill_(torch.nan)
    method.sample(images)
    assert method.skip_step


def test_chances_are_almost_equal_at_first(images):
    share = build().sample(images).exp()
    assert share.min() > 0.04
    assert share.max() < 0.1


def test_health_is_one_and_zero_at_its_ends():
    error = torch.tensor([[1.0, 2.0, 3.0]])
    even = torch.full((1, 4), 0.25).log()
    values = health(even, error.log(), error)
    torch.testing.assert_close(values["health/sampler_entropy"], torch.tensor(1.0))
    torch.testing.assert_close(values["health/error_correlation"], torch.tensor(1.0))
    certain = torch.tensor([[1.0, 1e-30, 1e-30, 1e-30]]).log()
    values = health(certain, error.flip(1).log(), error)
    torch.testing.assert_close(values["health/sampler_entropy"], torch.tensor(0.0))
    torch.testing.assert_close(values["health/error_correlation"], torch.tensor(-1.0))


def test_a_step_moves_all_of_the_sampler(images):
    method = build()
    optimizer = torch.optim.AdamW(method.sampler.parameters(), lr=3e-3)
    before = copy.deepcopy(method.sampler.state_dict())
    step(method, images).backward()
    optimizer.step()
    assert not any(torch.equal(value, before[name]) for name, value in method.sampler.state_dict().items())


def test_a_step_reads_nothing_back_from_the_device(images):
    method = build().to("meta")
    step(method, images.to("meta")).backward()
    assert method.encoder.vit.patch_embed.proj.weight.grad is not None


def test_pictures_show_what_is_hidden_what_is_predicted_and_probabilities_that_sum_to_one(images):
    pictures = build().eval().visualize(images)
    assert list(pictures) == ["hidden", "reconstruction", "probability"]
    assert patchify(pictures["hidden"], 8).eq(0).all(2).sum(1).tolist() == [12] * 4
    torch.testing.assert_close(pictures["probability"].sum((1, 2)), torch.ones(4))


@pytest.mark.parametrize("masking", [AttentionMasking(), RandomMasking()])
def test_a_policy_that_does_not_follow_the_sampler_is_refused(masking):
    with pytest.raises(ValueError, match="adamae needs a policy that hides equally many patches, guided"):
        AdaMAE(Encoder("test_vit", 32), masking, sampler=SamplerConfig(heads=2))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"a sampler of width 16 cannot have 3 heads; set sampler\.heads"):
        build(SamplerConfig(heads=3))


def test_without_a_target_pixels_are_predicted_standardised():
    target = build().target
    assert isinstance(target, PixelTarget)
    assert target.standardise


def test_the_few_visible_patches_are_measured_ones_where_there_are_enough():
    """Whatever the sampler would like to see; the loss stays finite where there are not."""
    method, images = build(), torch.randn(2, 3, 32, 32)
    valid = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    valid[0, :, :24], valid[1] = False, False  # 4 of 16 patches measured, as many as are visible; none
    mask = method.draw(method.sample(images), method.row_generator(2, 0), valid)
    assert mask[0].tolist() == [True] * 12 + [False] * 4
    assert mask[1].sum() == 12
    assert method.training_step(([images], torch.zeros(2), [valid]), 0).isfinite()

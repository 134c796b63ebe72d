"""MAE with CrossMAE's decoder."""

import pytest
import torch

from mim.benchmark.plain import plain_mae_loss
from mim.encoder import Encoder
from mim.errors import UserError
from mim.masking import RandomMasking
from mim.methods import MAE, Plan
from mim.methods.mae import CrossConfig
from mim.patches import pixel_targets, unpatchify

DINOV3 = "vit_small_patch16_dinov3"


def build(cross=None, model="vit_tiny_patch16_224", **kwargs):
    settings = {"embed_dim": 16, "depth": 3, "num_heads": 2} | kwargs
    encoder = Encoder(model, 32, 8, positions="sincos", kwargs=settings)
    method = MAE(encoder, RandomMasking(0.75), None, 16, 2, 2, cross=cross or CrossConfig())
    method.log = lambda *_, **__: None
    return method


def step(method, images):
    return method.training_step(([images], torch.zeros(len(images))), 0)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


def slow_loss(method, images, cross):
    """One image and one hidden patch at a time."""
    generator = method.row_generator(len(images), 0)
    mask = method.draw(images, generator)
    noise, decoder, vit = generator.rand(12), method.decoder, method.encoder.vit
    count, total, times = round(12 * cross.predicted), 0.0, 0
    after = method.encoder.after_blocks(images, range(3 - cross.mixed, 3), mask)
    layers = [*(tokens.x for tokens in after[:-1]), vit.norm(after[-1].x)]
    for image in range(len(images)):
        hidden = mask[image].nonzero()[:, 0].tolist()
        chosen = hidden if count == 12 else [hidden[i] for i in noise[image].argsort()[:count].tolist()]
        for patch in chosen:
            query = decoder.mask_token + decoder.positions[patch]
            for number, block in enumerate(decoder.blocks):
                context = layers[-1][image : image + 1]
                if cross.mixed > 1:
                    parts = zip(decoder.mix.shares[number], layers, strict=True)
                    context = decoder.mix.norms[number](
                        sum(share * tokens[image : image + 1] for share, tokens in parts)
                    )
                query = block(query, context)
            error = decoder.predict(decoder.norm(query))[0, 0] - pixel_targets(images, 8)[image, patch]
            total, times = total + error.square().mean().item(), times + 1
    return total / times


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", DINOV3])
@pytest.mark.parametrize(
    "cross", [CrossConfig(), CrossConfig(0.5), CrossConfig(1 / 3, 2), CrossConfig(mixed=3)], ids=str
)
def test_the_loss_equals_a_slow_loop(images, cross, model):
    method = build(cross, model)
    assert step(method, images).item() == pytest.approx(slow_loss(method, images, cross), rel=1e-5)


@pytest.mark.parametrize("cross", [CrossConfig(0.5), CrossConfig(0.5, 3)], ids=str)
def test_every_trainable_parameter_gets_a_gradient(images, cross):
    method = build(cross)
    step(method, images).backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_hidden_pixels_do_not_move_any_prediction(images):
    method = build(CrossConfig(mixed=2)).eval()
    mask = method.draw(images, method.row_generator(4, 0))
    area = unpatchify(mask[..., None].expand(-1, -1, 192).contiguous(), (4, 4), 8)
    repainted = torch.where(area, images + 1, images)
    assert torch.equal(method.reconstruct(repainted, mask)[0], method.reconstruct(images, mask)[0])


def test_another_part_is_predicted_in_every_row_and_step_and_pictures_predict_all(images, monkeypatch):
    method = build(CrossConfig(0.5))

    def places():
        generator = method.row_generator(4, 0)
        mask = method.draw(images, generator)
        return mask, method.reconstruct(images, mask, generator)[1]

    mask, first = places()
    assert first.shape == (4, 6)
    assert mask.gather(1, first).all()
    assert torch.equal(first, first.sort(dim=1).values)
    assert torch.equal(places()[1], first)
    monkeypatch.setattr(MAE, "global_step", 1)
    assert not torch.equal(places()[1], first)
    assert method.reconstruct(images, mask)[1].shape == (4, 12)


def test_the_learning_rate_is_scaled_by_the_share_that_is_predicted():
    for method, share in ((build(CrossConfig(0.25)), 0.25), (build(), 1.0)):
        method.plan = Plan(max_steps=10, steps_per_epoch=1, batch_size=512)
        assert method.peak_lr == pytest.approx(1.5e-4 * 2 * share)


def test_more_layers_than_the_encoder_has_are_refused():
    with pytest.raises(ValueError, match=r"cross\.mixed 4: the encoder has 3 blocks"):
        build(CrossConfig(mixed=4))


def test_there_is_no_plain_formulation_to_compare_with(images):
    with pytest.raises(UserError, match="no plain formulation with cross-attention"):
        plain_mae_loss(build(), ([images], torch.zeros(4)))

"""MAE with a momentum teacher: what it hides, and what the teacher is."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from mim.encoder import Encoder
from mim.masking import AttentionMasking, RandomMasking
from mim.methods import MAE, MomentumMAE, OptimConfig, Plan
from mim.patches import pixel_targets
from mim.randomness import RowGenerator

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def build(masking=None, **kwargs):
    encoder = Encoder("vit_tiny_patch16_224", 32, 8, positions="sincos", kwargs=KWARGS | kwargs)
    masking = masking or AttentionMasking("high", 0.75, 0.75, 0.0)
    method = MomentumMAE(encoder, masking, momentum=0.9, **DECODER, optim=OptimConfig(blr=0.1, warmup_epochs=0.0))
    method.plan = Plan(max_steps=10, batch_size=4)
    method.log = lambda *_: None
    return method


def fit(method, images, steps):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(method, DataLoader([([images], torch.zeros(len(images)))] * steps, batch_size=None))


@pytest.mark.parametrize("mode", ["high", "hint", "low"])
def test_the_teachers_attention_decides_and_the_loss_is_that_of_mae(mode):
    method, images = build(AttentionMasking(mode, 0.75, 0.75, 0.0)), torch.randn(4, 3, 32, 32)
    for parameter in method.teacher.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    scores = method.teacher.module.forward_with_attention(images)[1]
    mask = method.draw(images, RowGenerator.for_rows(0, 0, 4))
    assert torch.equal(mask, method.masking(4, (4, 4), scores=scores, generator=RowGenerator.for_rows(0, 0, 4)))
    assert mask.sum(1).tolist() == [16 - method.visible_count] * 4
    prediction, hidden = method.reconstruct(images, mask)
    expected = F.mse_loss(prediction, pixel_targets(images, (8, 8), hidden))
    method.draw = lambda *_: mask
    torch.testing.assert_close(method.training_step(([images], torch.zeros(4)), 0), expected)


def test_the_teacher_follows_without_a_gradient_and_the_student_is_exported():
    method, images = build(), torch.randn(4, 3, 32, 32)
    before = method.teacher.module.vit.blocks[0].attn.qkv.weight.clone()
    assert torch.equal(before, method.encoder.vit.blocks[0].attn.qkv.weight)
    fit(method, images, 1)
    teacher, student = (e.vit.blocks[0].attn.qkv.weight for e in (method.teacher.module, method.encoder))
    torch.testing.assert_close(teacher, 0.9 * before + 0.1 * student)
    assert not torch.equal(student, before)
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert method.backbone is method.encoder.vit


def test_teacher_weights_are_in_the_checkpoint_and_stay_in_evaluation_mode():
    method = build().train()
    assert any(name.startswith("teacher.") for name in method.state_dict())
    assert method.encoder.training
    assert not method.teacher.module.training


@pytest.mark.parametrize(
    "masking",
    [
        RandomMasking(0.75),
        AttentionMasking("high", 0.5, 0.75, 0.0),
        AttentionMasking("high", 0.75, 0.75, 0.5),
        AttentionMasking("hint", 0.05, 0.05, 0.0),
    ],
)
def test_masks_of_other_sizes_or_without_guidance_are_refused(masking):
    with pytest.raises(ValueError, match="momentum_mae needs a policy that hides equally many patches, guided"):
        build(masking)


def test_mae_refuses_guidance_that_it_cannot_give():
    encoder = Encoder("vit_tiny_patch16_224", 32, 8, kwargs=KWARGS)
    with pytest.raises(ValueError, match="mae needs a policy that hides equally many patches, unguided"):
        MAE(encoder, AttentionMasking("high", 0.75, 0.75, 0.0), **DECODER)


def test_an_encoder_without_class_token_is_refused():
    with pytest.raises(ValueError, match="has none"):
        build(class_token=False, global_pool="avg")

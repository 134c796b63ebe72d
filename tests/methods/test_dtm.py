import pytest
import torch
import torch.nn.functional as F

from mim.encoder import Encoder
from mim.masking import AttentionMasking, BlockMasking
from mim.methods import DTM, Plan
from mim.methods.dtm import group_loss
from mim.targets import FeatureTarget

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}
DINOV3 = "vit_small_patch16_dinov3"


def build(target=None, model="vit_tiny_patch16_224", draws=2, masking=None):
    encoder = Encoder(model, img_size=32, patch_size=8, kwargs=KWARGS)
    method = DTM(encoder, masking or BlockMasking(0.4, 0.4, 0.0), target, rounds=4, draws=draws)
    method.plan, method.logged = Plan(max_steps=10, batch_size=4), {}
    method.log_dict, method.log = method.logged.update, lambda name, value: method.logged.update({name: value})
    return method


@pytest.fixture
def frozen(monkeypatch):
    """Frozen ViTs of any name, without weights."""
    init = Encoder.__init__

    def small(self, *args, pretrained=False, **kwargs):
        init(self, *args, **kwargs | ({"img_size": 32, "patch_size": 8, "kwargs": KWARGS} if pretrained else {}))

    monkeypatch.setattr(Encoder, "__init__", small)
    return lambda model, distance="smooth": FeatureTarget(model, distance=distance)


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(4, 3, 32, 32)


def step(method, images, *valid):
    return method.training_step(([images], torch.zeros(len(images)), *valid), 0)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", DINOV3])
def test_the_loss_equals_a_slow_loop_over_groups_and_draws(model, images):
    method = build(model=model)
    generator = method.row_generator(4, 0)
    mask = method.masking(4, method.encoder.grid, progress=0.0, generator=generator)
    prefix = method.encoder.num_prefix
    target = F.layer_norm(method.teacher.module(images)[:, prefix:], (16,))
    prediction = method.predict(method.encoder(images, mask, method.mask_token)[:, prefix:])
    total = 0.0
    for _ in range(2):
        assign, groups = method.draw_groups(target, generator)
        for image in range(4):
            for group in range(groups):
                inside = assign[image] == group
                own, other = prediction[image, inside].mean(0), target[image, inside].mean(0)
                total += inside.sum() * F.smooth_l1_loss(own, other, beta=2.0) / (4 * 16 * 2)
    torch.testing.assert_close(step(method, images), total)


def test_groups_never_cost_more_than_single_patches_and_right_predictions_cost_nothing():
    method, target, prediction = build(), torch.randn(4, 16, 8), torch.randn(4, 16, 8)
    alone = group_loss(prediction, target, torch.arange(16).expand(4, 16), 16)
    torch.testing.assert_close(alone, F.smooth_l1_loss(prediction, target, beta=2.0))
    for _ in range(5):
        assign, groups = method.draw_groups(target, method.row_generator(4, 0))
        assert group_loss(prediction, target, assign, groups) <= alone
        assert group_loss(target, target, assign, groups) == 0


def test_groups_follow_from_seed_step_and_row(images):
    target = build().teach(images)
    both, last = build().row_generator(4, 0), build().row_generator(4, 0)
    last.keys = last.keys[2:]
    whole, groups = build().draw_groups(target, both)
    part, count = build().draw_groups(target[2:], last)
    assert groups == count
    assert torch.equal(whole[2:], part)


@pytest.mark.parametrize("model", [None, "vit_tiny_patch16_224", DINOV3])
def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(model, frozen, images):
    method = build(target=frozen(model) if model else None)
    step(method, images).backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # The class token of the last block goes nowhere but into the keys of the blocks before.
    assert silent == []
    teacher = method.target or method.teacher
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_hidden_pixels_reach_the_teacher_alone(images):
    method = build()
    mask = (torch.arange(16) < 4).expand(4, 16)
    changed = images.clone()
    changed[:, :, :8] += 1
    assert torch.equal(*(method.encoder(pixels, mask, method.mask_token) for pixels in (images, changed)))
    assert not torch.equal(method.teach(images), method.teach(changed))


def test_what_was_not_measured_does_not_count(images):
    method, valid = build(), torch.ones(4, 1, 32, 32, dtype=torch.bool)
    valid[:, :, :8] = False
    with torch.no_grad():
        method.predict.weight.zero_()
        assert torch.isfinite(step(method, images, [valid]))
    prediction, target = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
    target[:, 0] = 100
    measured = torch.tensor([[False, True, True, True]])
    loss = group_loss(prediction, target, torch.tensor([[0, 0, 1, 1]]), 2, measured)
    assert loss == F.smooth_l1_loss(torch.zeros(1), torch.ones(1), beta=2.0)


def test_the_average_moves_after_a_step_and_a_frozen_teacher_is_not_kept_twice(frozen):
    method = build()
    method.encoder.vit.cls_token.data.fill_(1.0)
    before = method.teacher.module.vit.cls_token.clone()
    method.after_optimizer_step(0)
    torch.testing.assert_close(method.teacher.module.vit.cls_token, 0.996 * before + 0.004)
    assert build(target=frozen("vit_tiny_patch16_224")).teacher is None


def test_what_cannot_be_is_refused(frozen):
    with pytest.raises(ValueError, match="no scores to guide"):
        build(masking=AttentionMasking())
    with pytest.raises(ValueError, match="distance: smooth"):
        build(target=frozen("vit_tiny_patch16_224", "direction"))


@pytest.mark.parametrize(("spread", "warns"), [(0.001, True), (0.5, False), (None, False)])
def test_a_teacher_that_says_the_same_of_all_patches_is_named(spread, warns):
    values = {} if spread is None else {"health/target_spread": spread}
    assert bool(build().health_warning(values)) == warns


def test_pictures_show_what_is_hidden_and_the_groups(images):
    pictures = build().visualize(images)
    assert list(pictures) == ["hidden", "groups"]
    assert pictures["hidden"].shape == images.shape
    assert pictures["groups"].shape == (4, 4, 4)
    assert not pictures["groups"].is_floating_point()

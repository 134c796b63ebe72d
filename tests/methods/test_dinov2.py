"""iBOT with the parts of DINOv2: balanced assignments, centres of hidden patches, two heads, KoLeo, registers."""

import pytest
import torch
from torch import nn

from mim.benchmark.plain import plain_ibot_loss
from mim.encoder import Encoder
from mim.errors import UserError
from mim.layers.koleo import koleo
from mim.layers.prototypes import Head
from mim.layers.sinkhorn import sinkhorn
from mim.masking import AttentionMasking, BlockMasking
from mim.methods import IBOT, OptimConfig, Plan
from mim.methods.ibot import HeadConfig, KoLeoConfig, TeacherConfig
from mim.patches import padded_places

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}
K = 12


def build(center="sinkhorn", shared="nothing", weight=0.1, masking=None):
    encoder = Encoder("vit_tiny_patch16_224", 32, 8, dynamic_img_size=True, registers=4, kwargs=KWARGS)
    method = IBOT(
        encoder,
        masking or BlockMasking(0.3, 0.6, 0.3),
        HeadConfig(K, 32, 8, shared),
        TeacherConfig(warmup_epochs=0, center=center),
        optim=OptimConfig(blr=0.02, warmup_epochs=0.0),
        koleo=KoLeoConfig(weight),
    )
    method.plan, method.logged = Plan(max_steps=20, steps_per_epoch=4, batch_size=4), {}
    method.log_dict, method.log = method.logged.update, lambda name, value: method.logged.update({name: value})
    for parameter in method.teacher.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    method.centers.normal_()
    return method


@pytest.fixture
def views():
    torch.manual_seed(0)
    return [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), *torch.randn(2, 4, 3, 16, 16)]


def step(method, views):
    return method.training_step((views, torch.zeros(len(views[0]))), 0)


def slow_loss(method, views, mask):
    """Explicit pairs, image by image and patch by patch, with logits of everything."""
    images, own, other = torch.cat(views[:2]), method.head, method.teacher.module["head"]
    student, teacher = method.encoder(images, mask, method.mask_token), method.evaluated(images)
    small = [own(method.encoder(view)[:, 0]) @ own.for_classes().T for view in views[2:]]
    classes = [*(own(student[:, 0]) @ own.for_classes().T).chunk(2), *small]
    patches = own.of_patches(student[:, 5:]) @ own.for_patches().T
    taught = other(teacher[:, 0]) @ other.for_classes().T
    taught_patches = other.of_patches(teacher[:, 5:]) @ other.for_patches().T
    if method.teaching.center == "sinkhorn":
        taught, hidden = sinkhorn(taught, 0.07), sinkhorn(taught_patches[mask], 0.07)
    else:
        taught = ((taught - method.centers[0]) / 0.07).softmax(-1)
        hidden = ((taught_patches[mask] - method.centers[1]) / 0.07).softmax(-1)
    total, pairs = 0.0, [(q, v) for q in range(2) for v in range(len(views)) if q != v]
    for q, v in pairs:
        for target, logits in zip(taught.chunk(2)[q], classes[v], strict=True):
            total -= target @ (logits / 0.1).log_softmax(-1) / len(views[0]) / len(pairs)
    for target, (image, patch) in zip(hidden, mask.nonzero(), strict=True):
        total -= target @ (patches[image, patch] / 0.1).log_softmax(-1) / mask[image].sum() / len(mask)
    return total + method.koleo.weight * sum(koleo(crop) for crop in student[:, 0].chunk(2))


@pytest.mark.parametrize("masking", [BlockMasking(0.3, 0.6, 0.3), AttentionMasking("high", 0.3, 0.6)])
@pytest.mark.parametrize("center", ["hidden", "sinkhorn"])
@pytest.mark.parametrize("shared", [True, False, "nothing"])
def test_the_loss_equals_a_slow_loop(views, center, shared, masking):
    method = build(center, shared, masking=masking)
    scores = method.teach(torch.cat(views[:2])).scores
    expected = slow_loss(method, views, method.draw_masks(4, scores, 0))
    torch.testing.assert_close(step(method, views), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("center", ["hidden", "sinkhorn"])
def test_places_that_only_fill_change_nothing(views, center, monkeypatch):
    method = build(center)
    counted = step(method, views)
    monkeypatch.setattr("mim.methods.ibot.hidden_places", padded_places)
    torch.testing.assert_close(step(method, views), counted)
    if center == "hidden":
        torch.testing.assert_close(*method.mean_logits)


@pytest.mark.parametrize("center", ["hidden", "sinkhorn"])
def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(views, center):
    method = build(center)
    step(method, views).backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []
    assert all(p.grad is None for p in method.teacher.parameters())


def test_without_a_center_the_centers_stand_still(views):
    method = build("sinkhorn")
    before = method.centers.clone()
    step(method, views)
    method.after_optimizer_step(0)
    assert torch.equal(method.centers, before)


def test_the_center_of_hidden_patches_moves_by_the_mean_of_their_logits_over_micro_batches(views):
    method, logits = build("hidden"), []
    before, other = method.centers.clone(), method.teacher.module["head"]
    for part in range(2):
        crops = [view[2 * part : 2 * part + 2] for view in views]
        mask = method.draw_masks(2, None, 0)
        tokens = method.evaluated(torch.cat(crops[:2]))[:, 5:]
        logits.append((other.of_patches(tokens) @ other.for_patches().T)[mask])
        method.training_step((crops, torch.zeros(2)), 0)
    method.move_centers()
    torch.testing.assert_close(method.centers[1], 0.9 * before[1] + 0.1 * torch.cat(logits).mean(0))


def test_the_center_stays_where_nothing_is_hidden(views):
    method = build("hidden", masking=BlockMasking(unmasked_share=1.0))
    before = method.centers.clone()
    step(method, views)
    method.move_centers()
    assert torch.equal(method.centers[1], before[1])
    assert not torch.equal(method.centers[0], before[0])


def test_two_heads_share_no_parameter():
    head = Head(16, K, 32, 8, "nothing")
    before = head.of_patches(torch.ones(1, 16)), head.for_patches()
    for module in (head.mlp, head.prototypes[0]):
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    assert torch.equal(head.of_patches(torch.ones(1, 16)), before[0])
    assert torch.equal(head.for_patches(), before[1])


def test_koleo_looks_at_class_tokens_of_each_large_crop_before_the_head(views):
    with_it, without = build(weight=0.5), build(weight=0.0)
    without.load_state_dict(with_it.state_dict())
    mask = with_it.draw_masks(4, None, 0)
    tokens = with_it.encoder(torch.cat(views[:2]), mask, with_it.mask_token)[:, 0]
    difference = step(with_it, views) - step(without, views)
    torch.testing.assert_close(difference, 0.5 * (koleo(tokens[:4]) + koleo(tokens[4:])), rtol=1e-4, atol=1e-5)
    assert "train/koleo" not in without.logged


def test_hidden_pixels_do_not_reach_the_student(views):
    method = build()
    mask = torch.arange(16) < torch.full((8, 1), 5)
    images = torch.cat(views[:2])
    changed = images.clone()
    changed[:, :, :8] += 1
    assert torch.equal(*(method.encoder(pixels, mask, method.mask_token) for pixels in (images, changed)))


@pytest.mark.parametrize(
    ("center", "masking", "name"),
    [("sinkhorn", None, "dinov2"), ("hidden", None, "ibot"), ("sinkhorn", AttentionMasking(), "attmask")],
)
def test_a_run_is_called_by_what_it_is(center, masking, name):
    assert build(center, masking=masking).name == name


@pytest.mark.parametrize(
    "setting",
    [lambda: TeacherConfig(center="some"), lambda: HeadConfig(shared="some"), lambda: KoLeoConfig(0.1, "some")],
)
def test_another_word_is_refused(setting):
    with pytest.raises(ValueError, match="some"):
        setting()


def test_the_plain_formulation_is_refused_for_other_losses_than_its_own(views):
    with pytest.raises(UserError, match="no plain formulation"):
        plain_ibot_loss(build(), (views, torch.zeros(4)))

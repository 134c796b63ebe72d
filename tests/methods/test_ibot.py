"""iBOT and AttMask: every claim of the paper's recipe, on tiny tensors."""

import copy
import math
from dataclasses import replace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from mim.benchmark.plain import plain_ibot_loss
from mim.encoder import Encoder
from mim.masking import AttentionMasking, BlockMasking
from mim.methods import IBOT, OptimConfig, Plan
from mim.methods.ibot import HeadConfig, TeacherConfig, clip_each
from mim.patches import hidden_places, padded_places

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}
K = 24


def build(masking=None, shared=True, unit=False, drop_path=0.0, plan=None, clip=3.0, freeze=0.0, **optim):
    encoder = Encoder(
        "vit_tiny_patch16_224", 32, 8, drop_path_rate=drop_path, dynamic_img_size=True, resampling="stretched",
        kwargs=KWARGS,
    )  # fmt: skip
    method = IBOT(
        encoder,
        masking or BlockMasking(0.3, 0.6, 0.3),
        HeadConfig(K, 32, 8, shared, unit),
        TeacherConfig(warmup_epochs=4),
        freeze,
        clip,
        OptimConfig(**{"blr": 0.02, "warmup_epochs": 0.0} | optim),
    )
    method.plan = plan or Plan(max_steps=20, steps_per_epoch=4, batch_size=4)
    return method


def quiet(method):
    method.logged = {}
    method.log_dict = method.logged.update
    return method


@pytest.fixture
def views():
    return [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), *torch.randn(3, 4, 3, 16, 16)]


def step(method, views):
    return method.training_step((views, torch.zeros(len(views[0]))), 0)


def fit(method, views, steps, **arguments):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip
    parts = trainer.accumulate_grad_batches
    micro = [([v.chunk(parts)[i] for v in views], torch.zeros(len(views[0]) // parts)) for i in range(parts)]
    trainer.fit(method, DataLoader(micro * steps, batch_size=None))
    return trainer


def outputs(method, views, mask):
    """Logits of student and teacher for everything, the plain way."""
    images, head, other = torch.cat(views[:2]), method.head, method.teacher.module["head"]
    student, teacher = method.encoder(images, mask, method.mask_token), method.evaluated(images)
    small = [head(method.encoder(view)[:, 0]) @ head.for_classes().T for view in views[2:]]
    large = (head(student[:, 0]) @ head.for_classes().T).chunk(2)
    return (
        [*large, *small],
        head(student[:, 1:]) @ head.for_patches().T,
        (other(teacher[:, 0]) @ other.for_classes().T).chunk(2),
        other(teacher[:, 1:]) @ other.for_patches().T,
    )


def slow_loss(method, views, mask):
    """Explicit pairs, image by image and patch by patch."""
    classes, patches, taught, taught_patches = outputs(method, views, mask)
    temperature = method.temperature(0.07)

    def entropy(target, center, logits):
        return -((target - center) / temperature).softmax(-1) @ (logits / 0.1).log_softmax(-1)

    pairs = [(q, v) for q in range(2) for v in range(len(views)) if q != v]
    total = 0.0
    for q, v in pairs:
        rows = zip(taught[q], classes[v], strict=True)
        total += sum(entropy(t, method.centers[0], s) for t, s in rows) / len(views[0]) / len(pairs)
    for image, row in enumerate(mask):
        for patch in row.nonzero()[:, 0]:
            error = entropy(taught_patches[image, patch], method.centers[1], patches[image, patch])
            total += error / row.sum() / len(mask)
    return total, len(pairs)


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("masking", [BlockMasking(0.3, 0.6, 0.3), AttentionMasking("hint", 0.3, 0.6)])
@pytest.mark.parametrize(("count", "pairs"), [(2, 2), (5, 8)])
def test_the_loss_equals_a_slow_loop_over_explicit_pairs(views, shared, masking, count, pairs):
    method = quiet(build(masking, shared))
    method.centers.normal_()
    for parameter in method.teacher.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    views = views[:count]
    scores = method.teach(torch.cat(views[:2])).scores
    expected, number = slow_loss(method, views, method.draw_masks(4, scores, 0))
    assert number == pairs
    torch.testing.assert_close(step(method, views), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masking", [BlockMasking(0.3, 0.6, 0.3), AttentionMasking("high", 0.3, 0.6)])
def test_the_plain_formulation_computes_the_same_loss_and_gradients(views, masking):
    method = quiet(build(masking))
    method.centers.normal_()
    losses, gradients = [], []
    for loss in (step(method, views), plain_ibot_loss(method, (views, torch.zeros(4)))):
        method.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in method.parameters() if p.requires_grad])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(*method.mean_logits)


class Fixed(BlockMasking):
    """Hides what it is told to."""

    def forward(self, batch_size, grid, **_):
        return self.mask


def with_mask(counts, **arguments):
    masking = Fixed()
    masking.mask = torch.arange(16)[None] < torch.tensor(counts)[:, None]
    return quiet(build(masking, **arguments))


@pytest.mark.parametrize(("counts", "share"), [([3] * 8, 1.0), ([3, 0] * 4, 0.5), ([0] * 8, 0.0)])
def test_uniform_logits_cost_log_k_times_the_share_of_masked_images(views, counts, share):
    method = with_mask(counts)
    for part in (method.head, method.teacher.module["head"]):
        part.prototypes[0].length.data.zero_()
    loss = step(method, views)
    assert method.logged["train/class"].item() == pytest.approx(math.log(K), rel=1e-5)
    assert method.logged["train/patch"].item() == pytest.approx(share * math.log(K), rel=1e-5)
    loss.backward()
    assert method.mask_token.grad.isfinite().all()


def test_images_weigh_the_same_however_much_they_hide():
    mask = torch.arange(100)[None] < torch.tensor([[1], [90], [0]])
    image, _, weight = hidden_places(mask, 90)
    sums = torch.zeros(3).index_add(0, image, weight)
    torch.testing.assert_close(sums, torch.tensor([1.0, 1.0, 0.0]))


def test_padded_places_weigh_as_counted_ones():
    mask = BlockMasking()(12, (6, 6))
    dense = []
    for image, patch, weight in (hidden_places(mask, 18), padded_places(mask, 18)):
        dense.append(torch.zeros(12, 36).index_put((image, patch), weight, accumulate=True))
    assert torch.equal(*dense)


def test_hidden_pixels_do_not_reach_the_student_and_reach_the_teacher(views):
    method = with_mask([5] * 8)
    images, mask = torch.cat(views[:2]), method.masking.mask
    changed = images.clone()
    changed[:, :, :8] += 1  # the first row of patches, which is hidden
    student = [method.encoder(pixels, mask, method.mask_token) for pixels in (images, changed)]
    assert torch.equal(*student)
    assert not torch.equal(method.evaluated(images), method.evaluated(changed))


def test_teacher_logits_at_visible_patches_move_the_center_and_not_the_loss(views):
    method = with_mask([4] * 8)
    taught = method.teach(torch.cat(views[:2]))
    points = torch.randn(32, 8, requires_grad=True)
    places = hidden_places(method.masking.mask, 16)
    losses, means = [], []
    for _ in range(2):
        losses.append(method.patch_losses(points, method.targets(taught, *places)[1], places[2])[0])
        means.append(method.mean_logits[-1][0][1])
        taught.tokens[:, 1 + 10 :] = 0
    assert torch.equal(*losses)
    assert not torch.equal(*means)


def test_chunks_do_not_change_the_loss(views, monkeypatch):
    method = with_mask([4] * 8)
    whole = step(method, views)
    monkeypatch.setattr("mim.layers.distillation.CHUNK", 5)
    torch.testing.assert_close(step(method, views), whole)


@pytest.mark.parametrize("masking", [BlockMasking(0.3, 0.6, 0.3), AttentionMasking(unmasked_share=0.0, low=0.3)])
def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(views, masking):
    method = quiet(build(masking, shared=False))
    step(method, views).backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


def test_gradients_are_the_same_when_the_mask_is_a_constant(views):
    method = quiet(build(AttentionMasking(unmasked_share=0.0, low=0.3)))
    step(method, views).backward()
    guided = method.encoder.vit.blocks[0].attn.qkv.weight.grad.clone()
    fixed = Fixed()
    fixed.mask = method.draw_masks(4, method.teach(torch.cat(views[:2])).scores, 0)
    method.masking = fixed
    method.zero_grad()
    step(method, views).backward()
    assert torch.equal(method.encoder.vit.blocks[0].attn.qkv.weight.grad, guided)


def test_small_crops_are_seen_whole_and_through_their_class_token_alone(views, monkeypatch):
    method, calls = quiet(build()), []
    forward = Encoder.forward

    def spy(self, images, mask=None, *rest, **more):
        calls.append((self is method.encoder, tuple(images.shape), mask is None))
        return forward(self, images, mask, *rest, **more)

    monkeypatch.setattr(Encoder, "forward", spy)
    step(method, views)
    assert calls == [
        (False, (8, 3, 32, 32), True),  # the teacher comes first
        (True, (8, 3, 32, 32), False),
        (True, (12, 3, 16, 16), True),
    ]


def test_hidden_places_of_a_device_are_not_counted():
    image, patch, weight = hidden_places(torch.ones(4, 16, dtype=torch.bool, device="meta"), 9)
    assert image.shape == patch.shape == weight.shape == (36,)


# Teacher, centres, schedules -----------------------------------------------------------------------------------------


def test_a_step_moves_teacher_and_centers_as_the_paper_says(views):
    method = build(
        BlockMasking(unmasked_share=0.0), plan=Plan(max_steps=10, steps_per_epoch=5, batch_size=4), drop_path=0.5
    )
    before, student = copy.deepcopy(method.teacher.module.state_dict()), copy.deepcopy(method.encoder.state_dict())
    torch.testing.assert_close(dict(method.teacher.module["encoder"].state_dict()), dict(student))
    _, _, taught, patches = outputs(method.eval(), views, torch.zeros(8, 16, dtype=torch.bool))
    fit(method.train(), views, 1)
    torch.testing.assert_close(method.centers[0], 0.1 * torch.cat(taught).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.centers[1], 0.1 * patches.mean((0, 1)), rtol=1e-4, atol=1e-5)
    after = nn.ModuleDict({"encoder": method.encoder, "head": method.head}).state_dict()
    for name, value in method.teacher.module.state_dict().items():
        torch.testing.assert_close(value, 0.996 * before[name] + 0.004 * after[name])
    assert "mask_token" not in method.teacher.module.state_dict()


def test_momentum_temperature_and_weight_decay_are_functions_of_the_step(monkeypatch):
    method = build(plan=Plan(max_steps=1000, steps_per_epoch=100), weight_decay=0.04, weight_decay_end=0.4)
    assert [method.momentum(s) for s in (0, 500)] == [pytest.approx(0.996), pytest.approx(0.998)]
    assert 1 - 1e-7 < method.momentum(999) < 1
    temperatures = []
    for done in (0, 99, 100, 300, 400, 900):
        monkeypatch.setattr(IBOT, "global_step", done)
        temperatures.append(method.temperature(0.07))
    assert temperatures == pytest.approx([0.04, 0.04, 0.05, 0.07, 0.07, 0.07])
    assert [method.weight_decay(s) for s in (0, 500, 1000)] == pytest.approx([0.04, 0.22, 0.4])


def test_only_the_decayed_group_follows_the_schedule_and_it_holds_the_tokens(views):
    method = build(weight_decay=0.04, weight_decay_end=0.4)
    trainer = fit(method, views, 20)
    names = {id(p): name for name, p in method.named_parameters()}
    decayed = {}
    for group in trainer.optimizers[0].param_groups:
        decayed |= {names[id(p)]: group["weight_decay"] for p in group["params"]}
    wanted = ["mask_token", "encoder.vit.cls_token", "encoder.vit.pos_embed", "head.prototypes.0.length"]
    assert [decayed[name] for name in wanted] == [pytest.approx(method.weight_decay(19))] * 4
    assert decayed["encoder.vit.norm.weight"] == decayed["head.mlp.0.bias"] == 0


def test_a_decay_that_starts_at_nothing_is_refused():
    with pytest.raises(ValueError, match="must start above 0"):
        OptimConfig(weight_decay=0.0, weight_decay_end=0.4)


def test_prototypes_stand_still_while_frozen_and_move_afterwards(views):
    method = build(plan=Plan(max_steps=8, steps_per_epoch=2), freeze=1.0, weight_decay=0.5)
    start, seen = method.head.prototypes[0].direction.detach().clone(), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, method, *_):
            seen.append(torch.equal(method.head.prototypes[0].direction, start))

    fit(method, views, 4, callbacks=[Watch()])
    assert seen == [True, True, False, False]


@pytest.mark.parametrize("unit", [True, False])
def test_lengths_of_prototypes_stay_one_where_asked(views, unit):
    method = build(unit=unit)
    fit(method, views, 3)
    lengths = method.head.for_classes().norm(dim=1)
    assert torch.allclose(lengths, torch.ones(K), atol=1e-6) == unit


@pytest.mark.parametrize("shared", [True, False])
def test_prototypes_are_shared_or_not_and_the_mlp_always_is(shared):
    head = build(shared=shared).head
    classes, patches = head.for_classes(), head.for_patches()
    with torch.no_grad():
        head.prototypes[0].direction.normal_()
    assert not torch.equal(head.for_classes(), classes)
    assert torch.equal(head.for_patches(), patches) != shared


def test_every_tensor_is_clipped_on_its_own():
    gradients = [torch.full((16,), 100.0), torch.full((4, 4), -100.0), torch.ones(1)]
    clip_each(gradients, 3.0)
    assert [g.norm().item() for g in gradients] == pytest.approx([3.0, 3.0, 1.0], rel=1e-5)


def test_drop_path_is_the_students_alone(views):
    method = quiet(build(drop_path=0.9)).train()
    first, second = (method.teach(torch.cat(views[:2])).tokens for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(method.encoder(views[0]), method.encoder(views[0]))


def test_twenty_steps_on_one_batch_lower_the_loss(views):
    """Of targets that stand still: centres and temperatures would move them, and the loss with them."""
    still = Plan(max_steps=20, steps_per_epoch=100, batch_size=4)
    method, losses = build(BlockMasking(0.3, 0.3, 0.0), plan=still, blr=0.05), []
    method.teaching = replace(method.teaching, center_momentum=1.0)

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, method, outputs, *_):
            losses.append(float(outputs["loss"]))

    fit(method, views, 20, callbacks=[Watch()])
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_accumulation_equals_the_whole_batch(views):
    results = []
    for parts in (1, 2):
        torch.manual_seed(0)
        method = build(clip=None)
        fit(method, views, 3, accumulate_grad_batches=parts)
        results.append(method.state_dict())
    for name in ("centers", "teacher.module.encoder.vit.blocks.0.attn.qkv.weight", "head.mlp.0.weight"):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-5)


def test_the_teacher_is_evaluated_and_exported():
    method = build()
    assert method.evaluated is method.teacher.module["encoder"]
    assert method.backbone is method.evaluated.vit


def test_the_teacher_starts_from_weights_that_the_student_was_given(views):
    method = build()
    with torch.no_grad():
        method.encoder.vit.cls_token.fill_(0.5)
    method.setup("fit")
    assert method.evaluated.vit.cls_token.eq(0.5).all()


# Health and pictures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entropy", "divergence", "cause"),
    [(0.999, 0.0, "uniform"), (0.001, 0.0, "same prototype"), (0.5, 1.0, None), (0.999, 1.0, None)],
)
def test_a_collapse_is_named_by_its_cause(entropy, divergence, cause):
    warning = build().health_warning({"health/class_entropy": entropy, "health/class_kl": divergence})
    assert warning is None if cause is None else cause in warning


@pytest.mark.parametrize("masking", [BlockMasking(), AttentionMasking()])
def test_pictures_show_masks_heads_and_clusters(views, masking):
    pictures = build(masking).eval().visualize(views[0])
    assert list(pictures) == ["hidden", "head 1", "head 2", "clusters"]
    assert pictures["hidden"].shape == (4, 3, 32, 32)
    assert pictures["head 1"].shape == pictures["clusters"].shape == (4, 4, 4)
    assert not pictures["clusters"].is_floating_point()


def test_attention_of_heads_averages_to_what_guides_the_mask(views):
    method = build().eval()
    tokens, attention = method.evaluated.forward_with_attention(views[0])
    torch.testing.assert_close(method.evaluated.head_attention(views[0]).mean(1), attention)
    torch.testing.assert_close(tokens, method.evaluated(views[0]))
    assert (attention.sum(1) < 1).all()


def test_an_encoder_without_class_token_is_refused():
    kwargs = KWARGS | {"class_token": False, "global_pool": "avg"}
    with pytest.raises(ValueError, match="has none"):
        IBOT(Encoder("vit_tiny_patch16_224", 32, 8, kwargs=kwargs), BlockMasking())


def test_masks_start_unseen_tokens_at_zero_and_tokens_as_the_reference():
    method = build()
    assert not method.mask_token.any()
    assert F.normalize(method.head.prototypes[0].direction, dim=1).shape == (K, 8)
    assert method.head.prototypes[0].length.eq(1).all()

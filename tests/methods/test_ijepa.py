import pytest
import torch
import torch.nn.functional as F

from mim.encoder import Encoder
from mim.masking import MultiBlockMasking
from mim.methods import IJEPA, Plan
from mim.methods.ijepa import GuardConfig
from mim.patches import patchify, unpatchify
from mim.randomness import RowGenerator

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}
DINOV3 = "vit_small_patch16_dinov3"


def build(stop=None, model="vit_tiny_patch16_224", masking=None, guard=None, **encoder):
    torch.manual_seed(0)
    arguments = {"img_size": 64, "patch_size": 8, "kwargs": KWARGS} | encoder
    method = IJEPA(Encoder(model, **arguments), masking or MultiBlockMasking(), 8, 2, 2, stop=stop, guard=guard)
    method.plan = Plan(max_steps=10, batch_size=8)
    method.log = method.log_dict = lambda *_, **__: None
    method.setup("fit")
    return method


def step(method, images, valid=None):
    return method.training_step(([images], torch.zeros(len(images)), *([[valid]] if valid is not None else [])), 0)


@pytest.fixture
def images():
    return torch.randn(4, 3, 64, 64)


@pytest.mark.parametrize(
    "settings",
    [{}, {"img_size": (32, 64)}, {"in_chans": 5}, {"model": DINOV3}, {"masking": MultiBlockMasking(released=True)}],
    ids=str,
)
def test_the_loss_equals_a_slow_loop_over_images_blocks_and_patches(settings):
    method = build(**settings)
    images = torch.randn(3, method.encoder.in_chans, *method.encoder.img_size)
    blocks, teacher, predictor = method.draw(3, 0), method.teacher.module, method.predictor
    prefix, errors = method.encoder.num_prefix, []
    for image, hidden, targets in zip(images, blocks.hidden, blocks.targets, strict=True):
        context = method.encoder(image[None], hidden[None])[0]
        places = (~hidden).nonzero()[:, 0]
        seen = predictor.project(context)
        seen[prefix:] += predictor.positions[places]
        taught = teacher(image[None])[0, prefix:]
        for block in targets:
            sequence = torch.cat([seen, predictor.mask_token[0] + predictor.positions[block]])[None]
            out = predictor.trunk.predict(predictor.trunk.norm(predictor.trunk.blocks(sequence)))[0, -len(block) :]
            for own, place in zip(out, block, strict=True):
                target = (taught[place] - taught[place].mean()) / (taught[place].var(correction=0) + 1e-5).sqrt()
                gap = (own - target).abs()
                errors.append(torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean().item())
    assert step(method, images).item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"model": DINOV3}, {"stop": 0.25}], ids=str)
def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(images, settings):
    method = build(**settings)
    step(method, images).backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", DINOV3])
def test_pixels_of_target_patches_never_change_a_prediction(images, model):
    method = build(model=model).eval()
    blocks = method.draw(4, 0)
    asked = torch.zeros_like(blocks.hidden).scatter(1, blocks.targets.flatten(1), True)
    assert (blocks.hidden | ~asked).all()
    area = unpatchify(asked[..., None].expand(-1, -1, 192).contiguous(), (8, 8), 8)
    before, after = (method.predict(pixels, blocks) for pixels in (images, torch.where(area, images + 1, images)))
    assert torch.equal(before, after)
    assert not torch.equal(method.predict(images + 1, blocks), before)


def test_a_block_is_predicted_as_if_it_were_asked_for_alone(images):
    method = build().eval()
    blocks = method.draw(4, 0)
    context = method.encoder(images, blocks.hidden)
    visible = (~blocks.hidden).nonzero()[:, 1].view(4, -1)
    whole = method.predictor(context, visible, blocks.targets)
    for number in range(4):
        alone = method.predictor(context, visible, blocks.targets[:, number : number + 1])
        torch.testing.assert_close(alone[:, 0], whole[:, number])


def test_blocks_are_a_function_of_seed_step_and_row_and_contexts_as_large_in_every_process(monkeypatch):
    method = build()
    whole = method.draw(8, 0)
    monkeypatch.setattr(method, "first_row", lambda size, _: 4)
    part = method.draw(2, 0)
    assert torch.equal(part.hidden, whole.hidden[4:6])
    assert torch.equal(part.targets, whole.targets[4:6])
    assert part.visible == whole.visible
    monkeypatch.setattr(IJEPA, "global_step", 1)
    assert not torch.equal(method.draw(2, 0).hidden, part.hidden)


def test_a_step_reads_nothing_back_from_the_device(images):
    method = build(stop=0.25).to("meta")
    step(method, images.to("meta")).backward()
    assert method.encoder.vit.patch_embed.proj.weight.grad is not None


def test_the_teacher_moves_along_a_straight_line_of_momenta_after_the_step():
    method = build()
    before = method.teacher.module.vit.norm.weight.clone()
    method.encoder.vit.norm.weight.data.fill_(3.0)
    method.after_optimizer_step(5)
    torch.testing.assert_close(method.teacher.module.vit.norm.weight, before + 0.002 * (3 - before))
    assert method.evaluated is method.teacher.module


def test_patches_that_were_not_measured_are_no_targets(images):
    method, valid = build(), torch.ones(4, 1, 64, 64, dtype=torch.bool)
    valid[0] = False
    expected = step(method, images)
    blocks = method.draw(4, 0)
    target = method.teach(images).gather(1, blocks.targets.flatten(1)[..., None].expand(-1, -1, 16))
    error = F.smooth_l1_loss(method.predict(images, blocks).flatten(1, 2), target, reduction="none").mean(-1)
    torch.testing.assert_close(error.mean(), expected)
    torch.testing.assert_close(step(method, images, valid), error[1:].mean())


# StoP ---------------------------------------------------------------------------------------------------------------


def test_noise_of_deviation_0_or_in_evaluation_is_i_jepa_to_the_bit(images):
    plain = step(build(), images)
    assert torch.equal(step(build(stop=0.0), images), plain)
    assert torch.equal(step(build(stop=0.25).eval(), images), step(build().eval(), images))
    assert not torch.equal(step(build(stop=0.25), images), plain)


def test_noisy_queries_have_the_mean_and_covariance_of_the_shared_projection():
    method = build(stop=0.5)
    targets = torch.tensor([[[3]]]).expand(40000, -1, -1)
    noise = method.noise(torch.Size((40000, 1, 1, 16)), RowGenerator.for_rows(0, 0, 40000))
    queries = method.predictor.queries(targets, noise)[:, 0, 0].detach()
    own = method.predictor.queries(targets[:1])[0, 0, 0]
    weight = method.predictor.project.weight
    torch.testing.assert_close(queries.mean(0), own, atol=0.02, rtol=0)
    torch.testing.assert_close(queries.T.cov(), 0.25 * weight @ weight.T, atol=0.02, rtol=0.03)


def test_noise_is_drawn_for_every_row_block_and_token_and_leaves_the_context_alone(images):
    method = build(stop=0.25)
    shape = torch.Size((2, 4, 3, 16))
    whole, part = (method.noise(shape, RowGenerator.for_rows(0, first, 4 - first)) for first in (0, 2))
    assert torch.equal(whole[2:], part)
    assert len(whole.flatten(0, 2).unique(dim=0)) == 4 * 4 * 3


def test_the_projection_learns_through_the_queries_alone():
    predictor = build().predictor
    noise = torch.randn(1, 4, 3, 16)
    predictor.queries(torch.arange(12).view(1, 4, 3), noise).square().sum().backward()
    assert predictor.project.weight.grad.any()
    assert predictor.project.bias.grad is None


# Guard --------------------------------------------------------------------------------------------------------------


def test_a_guard_adds_its_weighted_statistic_and_changes_nothing_else(images):
    logged, guarded = {}, build(guard=GuardConfig(weight=0.5, patches=2, directions=8))
    guarded.log = lambda name, value: logged.update({name: value})
    plain = step(build(), images)
    assert torch.equal(step(guarded, images), plain + 0.5 * logged["train/guard"])
    assert logged["train/guard"] > 0


def test_a_guard_judges_other_directions_and_patches_at_every_step_and_the_same_in_every_process(monkeypatch):
    method, context = build(guard=GuardConfig(patches=2, directions=8)), torch.randn(4, 9, 16)
    first = method.crowding(context, method.guard)
    monkeypatch.setattr(method, "first_row", lambda *_: 4)
    assert torch.equal(method.crowding(context, method.guard), first)
    monkeypatch.setattr(IJEPA, "global_step", 1)
    assert not torch.equal(method.crowding(context, method.guard), first)


def test_a_guard_spreads_features_that_have_collapsed():
    method, context = build(guard=GuardConfig()), (torch.randn(32, 4, 16) * 0.01).requires_grad_()
    optimizer = torch.optim.Adam([context], lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        method.crowding(context, method.guard).backward()
        optimizer.step()
    assert context.std(dim=0).mean() > 0.2


# Pictures and health ------------------------------------------------------------------------------------------------


def test_pictures_show_the_context_and_the_targets_which_share_no_pixel(images):
    method = build().eval()
    pictures = method.visualize(images)
    context, targets = (patchify(pictures[name], 8).ne(0).all(2) for name in ("hidden", "targets"))
    assert not (context & targets).any()
    assert (context.any(1) & targets.any(1)).all()
    assert torch.equal(pictures["error"].flatten(1) > 0, targets)
    assert torch.equal(method.visualize(images)["hidden"], pictures["hidden"])


def test_collapse_is_named():
    method = build()
    assert method.health_warning({"health/target_std": 0.4}) is None
    assert method.health_warning({}) is None
    assert "collapse" in method.health_warning({"health/target_std": 0.01})

import math
from collections import Counter

import pytest
import torch
from prepared_methods import prepared
from recipes import ROOT
from timm.layers.hybrid_embed import HybridEmbed
from torch import nn

from mim.encoder import Encoder
from mim.errors import UserError
from mim.masking import BlockMasking, GridMasking, RandomMasking
from mim.methods import MAE, Plan, TokenUnify
from mim.methods.tokenunify import TASKS, reaching
from mim.patches import patchify, unpatchify
from mim.reduction import KeepRate, TokenReduction
from mim.targets import HOGTarget, PixelTarget

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}
PLAIN, DINOV3, MIXED = "vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
ONLY = {"masked": (1, 0, 0), "next": (0, 1, 0), "rest": (0, 0, 1)}
MODELS = pytest.mark.parametrize(
    ("model", "kwargs"),
    [(PLAIN, {}), (PLAIN, {"reg_tokens": 2}), (PLAIN, {"class_token": False, "global_pool": "avg"}), (DINOV3, {})],
    ids=["plain", "registers", "no prefix", "rotary"],
)


def build(weights=(1, 1, 1), masking=None, target=None, model=PLAIN, kwargs=None, **encoder):
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "kwargs": KWARGS | (kwargs or {})} | encoder
    method = TokenUnify(Encoder(model, **arguments), masking or RandomMasking(), target, weights, **DECODER)
    method.logged = {}
    method.log = method.logged.__setitem__
    return method


def step(method, images, valid=None):
    return method.training_step(([images], torch.zeros(len(images)), *([[valid]] if valid is not None else [])), 0)


def mask_of(method, images):
    """The mask that ``step`` draws."""
    return method.draw_mask(method.row_generator(len(images), 0))


def repainted(images, patches, size=8):
    """Other pixels in the patches where ``patches (N,)`` is True."""
    grid = images.shape[2] // size, images.shape[3] // size
    area = patches[None, :, None].expand(1, -1, size * size * images.shape[1]).float().contiguous()
    return images + unpatchify(area, grid, size, images.shape[1])


def silent(method):
    """Parameters without any gradient."""
    return [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


def slow_loop(method, task, images):
    """The error of every predicted patch of every image, one after the other."""
    (size, _), first = method.encoder.patch_size, method.draw_task()[1]
    patches, errors = patchify(images, size), []
    for image, mask in enumerate(mask_of(method, images)):
        one = images[image : image + 1]
        if task == "next":
            tokens = masked_tokens(method, one)[0]
        else:
            hidden = mask if task == "masked" else torch.arange(len(mask)) >= first
            decoded = method.decoder(method.encoder(one, hidden[None]), hidden[None])[0]
        for place in range(len(mask)):
            if task == "next" and place:
                prediction = method.predict_next(tokens[method.encoder.num_prefix + place - 1])
            elif task != "next" and hidden[place]:
                prediction = decoded[place]
            else:
                continue
            true = patches[image, place]
            true = (true - true.mean()) / (true.var() + 1e-6).sqrt()
            errors.append((prediction - true).square().mean().item())
    return sum(errors) / len(errors)


def masked_tokens(method, images):
    """timm's own blocks with a mask of their attention, a row for every token: it sees those that are not behind it."""
    start = method.encoder._start(images)
    x, count = start.x, start.x.shape[1]
    bias = torch.zeros(count, count)
    for token in range(count):
        bias[token, token + 1 :] = -math.inf
    for layer, block in enumerate(method.encoder.vit.blocks):
        x = block(x, attn_mask=bias, **start.inputs(layer))
    return method.encoder.vit.norm(x)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"img_size": (16, 32)},
        {"in_chans": 5},
        {"masking": GridMasking(0.5)},
        {"kwargs": {"reg_tokens": 2}},
        {"model": DINOV3},
        {"model": MIXED},
    ],
    ids=str,
)
def test_the_loss_of_each_task_equals_a_slow_loop(task, settings):
    method = build(ONLY[task], **settings)
    images = torch.randn(3, method.encoder.in_chans, *method.encoder.img_size)
    assert step(method, images).item() == pytest.approx(slow_loop(method, task, images), rel=1e-5)


@MODELS
def test_a_changed_patch_leaves_predictions_up_to_its_own_as_they_were(model, kwargs, images):
    method = build(ONLY["next"], model=model, kwargs=kwargs).eval()
    before, places = method.foretell(images)
    assert places.tolist() == [list(range(1, 16))] * 4
    for patch in range(16):
        after, _ = method.foretell(repainted(images, torch.arange(16) == patch))
        changed = [place + 1 for place in range(15) if not torch.equal(before[:, place], after[:, place])]
        assert changed == list(range(patch + 1, 16))


def test_the_prefix_sees_no_patch_and_all_patches_see_it(images):
    encoder = build(kwargs={"reg_tokens": 2}).eval().encoder
    tokens = encoder.forward_causal(images)
    assert torch.equal(encoder.forward_causal(images + 1)[:, :3], tokens[:, :3])
    with torch.no_grad():
        encoder.vit.cls_token.add_(torch.randn(16))
    assert not torch.isclose(encoder.forward_causal(images), tokens).all(dim=2).any()


@MODELS
def test_hidden_pixels_do_not_move_what_is_predicted_of_the_rest(model, kwargs, images):
    method = build(ONLY["rest"], model=model, kwargs=kwargs).eval()
    mask = mask_of(method, images)
    for first in (1, 7, 15):
        before, places = method.predict("rest", images, mask, first)
        assert places.tolist() == [list(range(first, 16))] * 4
        after, _ = method.predict("rest", repainted(images, torch.arange(16) >= first), mask, first)
        assert torch.equal(before, after)
        moved, _ = method.predict("rest", repainted(images, torch.arange(16) == first - 1), mask, first)
        assert not torch.isclose(before, moved).all(dim=2).any()


def test_hidden_pixels_do_not_move_what_is_predicted_of_masked_patches(images):
    method, mask = build().eval(), torch.arange(16) % 4 != 0
    before, _ = method.predict("masked", images, mask.expand(4, -1), 1)
    assert torch.equal(method.predict("masked", repainted(images, mask), mask.expand(4, -1), 1)[0], before)


@pytest.mark.parametrize("masking", [RandomMasking(), GridMasking(0.5)])
def test_with_all_weight_on_masked_patches_it_is_mae_to_the_bit(masking, images):
    method = build((1, 0, 0), masking, positions="sincos")
    torch.manual_seed(0)
    encoder = Encoder(PLAIN, 32, 8, positions="sincos", kwargs=KWARGS)
    mae = MAE(encoder, masking, **DECODER)
    mae.log = lambda *_: None
    assert method.state_dict().keys() == mae.state_dict().keys()
    assert all(torch.equal(value, mae.state_dict()[name]) for name, value in method.state_dict().items())
    losses = [step(one, images) for one in (method, mae)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    pairs = zip(method.parameters(), mae.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs if one.requires_grad)


@pytest.mark.parametrize("settings", [{}, {"kwargs": {"reg_tokens": 2}}, {"model": DINOV3}, {"model": MIXED}], ids=str)
def test_over_the_tasks_every_trainable_parameter_gets_a_gradient(settings, images, monkeypatch):
    method, drawn = build(**settings), set()
    for number in range(9):
        monkeypatch.setattr(TokenUnify, "global_step", number)
        drawn.add(method.draw_task()[0])
        step(method, images).backward()
    assert drawn == set(TASKS)
    assert silent(method) == []


@pytest.mark.parametrize("task", TASKS)
def test_every_task_alone_leaves_no_parameter_without_a_gradient(task, images):
    method = build(ONLY[task])
    step(method, images).backward()
    assert silent(method) == []


@pytest.mark.parametrize("task", TASKS)
def test_a_part_without_a_task_gets_a_gradient_of_zero(task, images, monkeypatch):
    method = build()
    monkeypatch.setattr(method, "draw_task", lambda: (task, 5))
    step(method, images).backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    idle = method.decoder if task == "next" else method.predict_next
    assert not any(p.grad.any() for p in idle.parameters())


def test_what_reaches_a_part_without_a_task_adds_nothing():
    loss = torch.rand((), requires_grad=True)
    assert torch.equal(reaching(loss, nn.Linear(3, 3)), loss)


def draws(method, monkeypatch, steps, seed=0):
    method.plan = Plan(max_steps=steps, seed=seed)
    found = []
    for number in range(steps):
        monkeypatch.setattr(TokenUnify, "global_step", number)
        found.append(method.draw_task())
    return found


def test_tasks_and_lengths_are_a_function_of_seed_and_step(monkeypatch):
    method = build()
    whole = draws(method, monkeypatch, 50)
    monkeypatch.setattr(method, "first_row", lambda *_: 100)  # another process
    torch.rand(5)
    assert draws(method, monkeypatch, 50) == whole
    assert draws(method, monkeypatch, 50, seed=1) != whole


def test_tasks_are_drawn_by_their_weights_and_lengths_alike_from_one_to_all_but_one(monkeypatch):
    found = draws(build((2, 1, 1)), monkeypatch, 3000)
    tasks, lengths = Counter(task for task, _ in found), Counter(length for _, length in found)
    assert [tasks[task] / 3000 for task in TASKS] == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    assert sorted(lengths) == list(range(1, 16))
    assert all(count == pytest.approx(200, abs=60) for count in lengths.values())


@pytest.mark.parametrize("task", TASKS)
def test_a_task_of_no_weight_is_never_drawn(task, monkeypatch):
    assert {drawn for drawn, _ in draws(build(ONLY[task]), monkeypatch, 100)} == {task}


def test_masks_are_a_function_of_seed_step_and_row(images, monkeypatch):
    method = build()
    whole = mask_of(method, images)
    monkeypatch.setattr(method, "first_row", lambda *_: 2)
    assert torch.equal(mask_of(method, images[2:]), whole[2:])
    monkeypatch.setattr(TokenUnify, "global_step", 1)
    assert not torch.equal(mask_of(method, images[2:]), whole[2:])


@pytest.mark.parametrize("task", TASKS)
def test_the_log_tells_which_task_a_loss_is_of(task, images):
    method = build(ONLY[task])
    loss = step(method, images)
    assert torch.equal(method.logged["train/loss"], loss)
    assert TASKS[int(method.logged["train/task"])] == task


@pytest.mark.parametrize("task", TASKS)
def test_a_step_reads_nothing_back_from_the_device(task, images):
    method = build(ONLY[task]).to("meta")
    step(method, images.to("meta")).backward()
    assert method.encoder.vit.patch_embed.proj.weight.grad is not None


@pytest.mark.parametrize("task", TASKS)
def test_what_was_not_measured_is_no_target(task, images):
    method, valid = build(ONLY[task]), torch.ones(4, 1, 32, 32, dtype=torch.bool)
    valid[:2, :, -8:] = False
    places = torch.arange(10, 16).expand(4, -1)
    method.predict = lambda *_: (torch.zeros(4, 6, 192), places)
    losses = [step(method, torch.where(valid, images, number), valid) for number in (0.0, 5.0)]
    assert torch.equal(*losses)
    torch.testing.assert_close(losses[0], torch.tensor(191 / 192), atol=1e-5, rtol=0)


def test_recomputed_blocks_give_the_same_gradient(images):
    found = []
    for recompute in (False, True):
        method = build(ONLY["next"], grad_checkpointing=recompute)
        step(method, images).backward()
        found.append(method.encoder.vit.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("task", TASKS)
def test_twenty_steps_of_each_task_on_one_batch_lower_its_loss(task, images):
    method = build(ONLY[task])
    optimizer = torch.optim.AdamW((p for p in method.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(20):
        losses.append(loss := step(method, images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


def test_pictures_show_every_task_with_true_pixels_where_nothing_is_predicted(images):
    method = build().eval()
    pictures = method.visualize(images)
    assert list(pictures) == ["hidden", "reconstruction", "next", "rest"]
    true = patchify(images, 8)
    assert patchify(pictures["hidden"], 8).eq(0).all(2).sum(1).tolist() == [12] * 4
    torch.testing.assert_close(patchify(pictures["next"], 8)[:, 0], true[:, 0])
    assert torch.equal(patchify(pictures["rest"], 8)[:, :8], true[:, :8])
    assert not torch.isclose(patchify(pictures["rest"], 8)[:, 8:], true[:, 8:]).all(2).any()
    assert list(build((0, 1, 0)).visualize(images)) == ["next"]
    assert torch.equal(method.visualize(images)["rest"], pictures["rest"])


def test_edges_may_be_predicted_and_are_drawn(images):
    method = build(target=HOGTarget())
    assert step(method, images).isfinite()
    assert list(method.visualize(images)) == ["hidden", "edges", "imagined edges", "next", "rest"]


def test_standardised_pixels_are_predicted_if_nothing_else_is_asked_for():
    target = build().target
    assert isinstance(target, PixelTarget)
    assert (target.standardise, target.distance) == (True, "squared")


@pytest.mark.parametrize("weights", [(0, 0, 0), (0.0, 0.0, 0.0)])
def test_weights_by_which_nothing_is_drawn_are_refused(weights):
    with pytest.raises(ValueError, match="no task is ever drawn"):
        build(weights)


def test_a_stem_that_looks_beyond_patches_is_refused_by_name():
    encoder = build().encoder
    encoder.vit.patch_embed = HybridEmbed(nn.Conv2d(3, 8, 7, 8, 3), img_size=32, patch_size=1, in_chans=3, embed_dim=16)
    with pytest.raises(UserError, match="HybridEmbed shows what lies beyond a patch"):
        TokenUnify(encoder, RandomMasking())


def test_an_encoder_with_a_reduction_is_refused():
    with pytest.raises(ValueError, match="must not have a reduction"):
        build(reduction=TokenReduction(KeepRate(1.0)))


def test_a_policy_that_hides_unequally_is_refused():
    with pytest.raises(ValueError, match="tokenunify needs a policy that hides equally many patches"):
        build(masking=BlockMasking())


def test_the_demo_draws_all_tasks_alike(monkeypatch):
    monkeypatch.chdir(ROOT)
    method, _ = prepared("tokenunify")
    assert isinstance(method, TokenUnify)
    assert method.weights == dict.fromkeys(TASKS, 1.0)

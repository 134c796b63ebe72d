import copy

import lightning as L
import pytest
import torch
from prepared_methods import prepared
from recipes import ROOT
from torch.utils.data import DataLoader

from mim.encoder import Encoder
from mim.layers.token_dropping import MOMENTUM, PlaceErrors
from mim.masking import GridMasking, RandomMasking
from mim.methods import MAE, OptimConfig, Plan, SimMIM
from mim.methods.mae import CrossConfig
from mim.patches import visible_indices
from mim.reduction import KeepRate, TokenReduction

KWARGS = {"embed_dim": 16, "depth": 4, "num_heads": 2}
PLAIN, DINOV3, MIXED = "vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"


def encoder(model=PLAIN, kwargs=None, **settings):
    return Encoder(model, 32, 8, kwargs=KWARGS | (kwargs or {}), **settings)


def mae(share=0.5, **settings):
    torch.manual_seed(0)
    method = MAE(encoder(), RandomMasking(0.5), None, 16, 1, 2, OptimConfig(blr=0.1), middle_share=share, **settings)
    method.plan = Plan(max_steps=12, batch_size=4)
    return method


def simmim(share=0.5):
    torch.manual_seed(0)
    method = SimMIM(encoder(), GridMasking(0.5, None), optim=OptimConfig(blr=0.1), middle_share=share)
    method.plan = Plan(max_steps=12, batch_size=4)
    return method


both = pytest.mark.parametrize("build", [mae, simmim])


def step(method, images, valid=None):
    method.log = lambda *_: None
    return method.training_step(([images], torch.zeros(len(images)), *([[valid]] if valid is not None else [])), 0)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


def slow(one, images, passing, mask=None):
    """Token after token: which blocks it goes through, and beside whom."""
    start, prefix = one._start(images, mask), list(range(one.num_prefix))
    rows = []
    for image, chosen in enumerate(passing.tolist()):
        state = start.x[image].clone()
        for layer, block in enumerate(one.vit.blocks):
            inputs = start.inputs(layer)
            patches = chosen if layer in one.middle else list(range(start.count))
            goes = [*prefix, *(one.num_prefix + patch for patch in patches)]
            if "rope" in inputs:
                rope = inputs["rope"]
                rope = rope[image] if rope.ndim == 4 else rope
                inputs["rope"] = rope[..., patches, :]
            state = state.clone()
            state[goes] = block(state[None, goes], **inputs)[0]
        rows.append(one.vit.norm(state))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "settings",
    [{}, {"kwargs": {"depth": 6, "reg_tokens": 2}}, {"kwargs": {"depth": 3}}, {"model": DINOV3}, {"model": MIXED}],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_that_pass_by_the_middle_equal_a_slow_loop(settings, masked, images):
    one = encoder(**settings).eval()
    mask = torch.rand(4, 16).argsort(1) >= 8 if masked else None
    count = 8 if masked else 16
    passing = torch.rand(4, count).argsort(1)[:, :3].sort(1).values
    torch.testing.assert_close(one(images, mask, passing=passing), slow(one, images, passing, mask))


def test_the_middle_begins_one_before_half_and_ends_before_the_last_block():
    assert encoder(kwargs={"depth": 12}).middle == range(5, 11)
    assert encoder(kwargs={"depth": 4}).middle == range(1, 3)
    assert encoder(kwargs={"depth": 3}).middle == range(1, 2)
    assert not encoder(kwargs={"depth": 2}).middle


@pytest.mark.parametrize("model", [PLAIN, DINOV3, MIXED])
@pytest.mark.parametrize("masked", [False, True])
def test_with_all_tokens_in_the_middle_nothing_changes_to_the_bit(model, masked, images):
    one = encoder(model).eval()
    mask = torch.rand(4, 16).argsort(1) >= 8 if masked else None
    everything = torch.arange(8 if masked else 16).expand(4, -1)
    assert torch.equal(one(images, mask, passing=everything), one(images, mask))


@both
def test_a_share_of_one_is_the_method_without_it_to_the_bit(build, images):
    method, plain = build(1.0), build(1.0)
    assert method.place_errors is None
    wide = build(0.999)  # of 8 or 16 tokens all
    assert torch.equal(step(wide, images), step(plain, images))
    assert set(wide.state_dict()) - set(plain.state_dict()) == {"place_errors.mean"}


def test_recomputed_blocks_give_the_same_gradient(images):
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        one = encoder(grad_checkpointing=recompute)
        one(images, passing=torch.arange(5).expand(4, -1)).square().mean().backward()
        found.append(one.vit.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*found)


@both
def test_tokens_of_places_with_large_errors_go_through_the_middle(build, images, monkeypatch):
    method = build()
    method.place_errors.mean.copy_(torch.randperm(16).float())
    seen = []
    run = method.encoder.forward
    monkeypatch.setattr(method.encoder, "forward", lambda *a, **k: seen.append(k["passing"]) or run(*a, **k))
    mask = method.draw_mask(method.row_generator(4, 0))
    method.reconstruct(images, mask)
    places = visible_indices(mask) if build is mae else torch.arange(16).expand(4, -1)
    for row, chosen in zip(places.tolist(), seen[0].tolist(), strict=True):
        best = sorted(row, key=lambda place: -method.place_errors.mean[place])[: len(row) // 2]
        assert [row[number] for number in chosen] == sorted(best)


def test_places_that_are_equal_are_taken_in_their_order():
    errors = PlaceErrors(16, 0.5)
    assert errors.important(torch.arange(16).expand(2, -1)).tolist() == [list(range(8))] * 2


@both
def test_every_trainable_parameter_gets_a_gradient(build, images):
    method = build()
    step(method, images).backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


@both
def test_the_running_error_of_a_place_is_that_of_a_slow_loop(build, images):
    method = build()
    mask = method.draw_mask(method.row_generator(4, 0))
    prediction, hidden = method.reconstruct(images, mask)
    error = method.target.error(prediction, method.target(images, (4, 4), hidden))
    expected = []
    for place in range(16):
        own = [error[i, n].item() for i in range(4) for n in range(hidden.shape[1]) if hidden[i, n] == place]
        expected.append(MOMENTUM + (1 - MOMENTUM) * sum(own) / len(own) if own else 1.0)
    step(method, images)
    method.after_optimizer_step(0)
    torch.testing.assert_close(method.place_errors.mean, torch.tensor(expected))


def test_micro_batches_and_processes_add_up_to_the_batch(monkeypatch):
    error, places = torch.rand(4, 5), torch.rand(4, 16).argsort(1)[:, :5]
    whole, parts = PlaceErrors(16, 0.5), PlaceErrors(16, 0.5)
    whole.add(error, places)
    for rows in (slice(0, 2), slice(2, 4)):
        parts.add(error[rows], places[rows])
    for errors in (whole, parts):
        errors.update(torch.tensor(False))
    torch.testing.assert_close(whole.mean, parts.mean)
    other = PlaceErrors(16, 0.5)
    other.add(error[2:], places[2:])
    theirs, first = other._sums, PlaceErrors(16, 0.5)
    first.add(error[:2], places[:2])
    monkeypatch.setattr("mim.layers.token_dropping.sum_over_processes", lambda sums: sums + theirs)
    first.update(torch.tensor(False))
    torch.testing.assert_close(whole.mean, first.mean)


def test_a_step_that_is_skipped_moves_nothing():
    errors = PlaceErrors(16, 0.5)
    errors.add(torch.full((2, 3), torch.nan), torch.arange(3).expand(2, -1))
    errors.update(torch.tensor(True))
    assert torch.equal(errors.mean, torch.ones(16))
    errors.update(torch.tensor(False))  # and is forgotten
    assert torch.equal(errors.mean, torch.ones(16))


@both
def test_what_was_not_measured_is_no_error(build, images):
    method, valid = build(), torch.ones(4, 1, 32, 32, dtype=torch.bool)
    valid[:, :, -8:] = False
    step(method, torch.where(valid, images, 0), valid)
    method.after_optimizer_step(0)
    assert torch.equal(method.place_errors.mean[12:], torch.ones(4))
    assert (method.place_errors.mean[:12] != 1).any()


@both
def test_a_step_reads_nothing_back_from_the_device(build, images):
    method = build().to("meta")
    step(method, images.to("meta")).backward()
    method.after_optimizer_step(0)
    assert method.encoder.vit.patch_embed.proj.weight.grad is not None


class Save(L.Callback):
    """Saves once, between two steps."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path, weights_only=False)


def fit(method, first=0, callbacks=(), checkpoint=None):
    generator = torch.Generator().manual_seed(1)
    batches = [([torch.randn(4, 3, 32, 32, generator=generator)], torch.zeros(4))] * 12  # masks differ
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_steps=12, max_epochs=-1, callbacks=list(callbacks), **quiet)
    trainer.fit(method, DataLoader(batches[first:], batch_size=None), ckpt_path=checkpoint, weights_only=True)
    return copy.deepcopy(method.state_dict())


@both
def test_a_resumed_run_ends_as_one_that_was_not_stopped(build, tmp_path):
    whole = fit(build(), callbacks=[Save(tmp_path / "half.ckpt")])
    resumed = fit(build(), 5, checkpoint=tmp_path / "half.ckpt")
    assert (whole["place_errors.mean"] != 1).all()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_an_encoder_without_a_middle_or_with_a_reduction_is_refused():
    with pytest.raises(ValueError, match="an encoder of 2 blocks has none in the middle"):
        SimMIM(encoder(kwargs={"depth": 2}), GridMasking(0.5, None), middle_share=0.5)
    with pytest.raises(ValueError, match="has a reduction"):
        SimMIM(encoder(reduction=TokenReduction(KeepRate(1.0))), GridMasking(0.5, None), middle_share=0.5)
    with pytest.raises(ValueError, match=r"cross\.mixed 2 reads blocks"):
        mae(cross=CrossConfig(mixed=2))


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_recipes_take_it_as_an_option(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    model = "--model.init_args.encoder."
    small = [f"{model}model=vit_tiny_patch16_224", f"{model}kwargs={{embed_dim: 16, depth: 4, num_heads: 2}}"]
    method, _ = prepared(name, *small, "--model.init_args.middle_share", "0.5")
    assert method.place_errors.share == 0.5

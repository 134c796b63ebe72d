"""What all methods share: optimizer groups, learning rate, keyed rows, and the guard against NaN."""

import copy
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import ClassVar

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from mim.encoder import Encoder
from mim.errors import UserError
from mim.layers.teacher import Teacher
from mim.masking import RandomMasking
from mim.methods import Method, NonFiniteError, OptimConfig, Plan

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Mean(Method):
    """Pulls the mean of the tokens to zero; ``poison`` multiplies the loss of a step."""

    poison: ClassVar[dict[int, float]] = {}

    def training_step(self, batch, batch_idx):
        (images,), _ = batch
        return self.encoder(images).square().mean() * self.poison.get(self.global_step, 1.0)


def build(plan=None, **optim):
    kwargs = {"embed_dim": 16, "depth": 1, "num_heads": 2, "reg_tokens": 2}
    method = Mean(Encoder("test_vit", 16, 8, kwargs=kwargs), RandomMasking(), OptimConfig(**optim))
    method.plan = plan or Plan(max_steps=10, steps_per_epoch=5, batch_size=256)
    return method


def fit(method, steps, **arguments):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    batches = [([IMAGES], torch.zeros(4))] * (steps * trainer.accumulate_grad_batches)
    trainer.fit(method, DataLoader(batches, batch_size=None))
    return trainer


def attach(method, monkeypatch, rank=0, world_size=1, accumulate=1, step=0):
    trainer = SimpleNamespace(global_rank=rank, world_size=world_size, accumulate_grad_batches=accumulate)
    monkeypatch.setattr(method, "_trainer", trainer)
    monkeypatch.setattr(type(method), "global_step", step)
    return method


# Optimizer and learning rate -----------------------------------------------------------------------------------------


def test_tokens_and_matrices_decay_but_biases_and_norms_do_not():
    method = build(weight_decay=0.05)
    names = {id(p): name for name, p in method.named_parameters()}
    groups = method.configure_optimizers().param_groups
    decay = {
        names[id(p)].removeprefix("encoder.vit."): group["weight_decay"] for group in groups for p in group["params"]
    }
    assert len(decay) == len(names)
    assert {decay[name] for name in ("cls_token", "reg_token", "blocks.0.attn.qkv.weight")} == {0.05}
    assert {decay[name] for name in decay if name.endswith("bias") or "norm" in name} == {0.0}


def test_frozen_positions_are_in_no_group():
    method = Mean(Encoder("test_vit", 16, 8, positions="sincos"), RandomMasking(), OptimConfig())
    parameters = [p for group in method.configure_optimizers().param_groups for p in group["params"]]
    assert not any(p is method.encoder.vit.pos_embed for p in parameters)


def test_the_optimizer_has_the_settings_of_the_recipe():
    optimizer = build(betas=(0.8, 0.7)).configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.7)}
    assert optimizer.defaults["fused"]  # the kind that honours found_inf


@pytest.mark.parametrize(("batch_size", "peak"), [(256, 1.5e-4), (4096, 2.4e-3), (64, 3.75e-5)])
def test_the_peak_learning_rate_follows_the_global_batch(batch_size, peak):
    assert build(Plan(batch_size=batch_size), blr=1.5e-4).peak_lr == pytest.approx(peak)


def test_the_learning_rate_starts_at_zero_peaks_after_warm_up_and_ends_at_its_minimum():
    method = build(Plan(max_steps=100, steps_per_epoch=10, batch_size=512), blr=1e-3, warmup_epochs=2, min_lr=1e-6)
    assert method.warmup_steps == 20
    rates = [method.learning_rate(step) for step in range(101)]
    assert (rates[0], rates[10], rates[20]) == (0.0, pytest.approx(1e-3), pytest.approx(2e-3))
    assert rates[100] == pytest.approx(1e-6)
    assert all(a < b for a, b in pairwise(rates[:21]))
    assert all(a > b for a, b in pairwise(rates[20:]))


def test_warm_up_takes_at_most_half_of_a_short_run():
    assert build(Plan(max_steps=10, steps_per_epoch=5), warmup_epochs=40).warmup_steps == 5


def test_every_step_uses_its_own_learning_rate():
    method, used = build(Plan(max_steps=4, steps_per_epoch=1, batch_size=256), warmup_epochs=2), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            used.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(method, 4, callbacks=[Watch()])
    assert used == [method.learning_rate(step) for step in range(4)]


def test_a_scale_of_a_group_multiplies_its_learning_rate(monkeypatch):
    method = build(warmup_epochs=0)
    optimizer = method.configure_optimizers()
    optimizer.param_groups[0]["lr_scale"] = 0.5
    attach(method, monkeypatch)
    monkeypatch.setattr(L.LightningModule, "optimizer_step", lambda *_: None)
    method.optimizer_step(0, 0, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [method.peak_lr * 0.5, method.peak_lr]


# Masks ---------------------------------------------------------------------------------------------------------------


class TwoPolicies(Mean):
    """A method with policies of other names than ``masking``."""

    def __init__(self, *policies):
        kwargs = {"embed_dim": 16, "depth": 1, "num_heads": 2}
        super().__init__(Encoder("test_vit", 32, 8, kwargs=kwargs), None, OptimConfig())
        self.policies = torch.nn.ModuleList(policies)


def test_every_policy_of_a_method_is_described():
    words = TwoPolicies(RandomMasking(0.75), RandomMasking(0.5)).mask_words()
    assert words == ("RandomMasking(ratio=0.75) hides 12 of 16 patches; RandomMasking(ratio=0.5) hides 8 of 16 patches")


def test_a_method_without_a_policy_hides_nothing_and_may():
    method = TwoPolicies()
    assert method.mask_words() == "nothing is hidden"
    method.check()


@pytest.mark.parametrize("policies", [[RandomMasking(0.0)], [RandomMasking(0.5), RandomMasking(0.0)]])
def test_a_policy_that_hides_nothing_is_refused_wherever_a_method_keeps_it(policies):
    with pytest.raises(UserError, match="hides all or none of 16 patches"):
        TwoPolicies(*policies).check()


# Rows ----------------------------------------------------------------------------------------------------------------


def test_rows_of_ranks_and_micro_batches_tile_the_global_batch(monkeypatch):
    method = build()
    for first_batch in (0, 12):  # of an earlier or a later step
        firsts = [
            attach(method, monkeypatch, rank, world_size=2, accumulate=3).first_row(4, first_batch + micro)
            for micro in range(3)
            for rank in range(2)
        ]
        assert firsts == [0, 4, 8, 12, 16, 20]


def test_row_numbers_do_not_depend_on_how_the_batch_is_split(monkeypatch):
    method = build()
    whole = attach(method, monkeypatch, step=7).row_generator(24, 7).rand(5)
    parts = [
        attach(method, monkeypatch, rank, world_size=2, accumulate=3, step=7).row_generator(4, 21 + micro).rand(5)
        for micro in range(3)
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_row_numbers_change_with_the_step_and_the_seed(monkeypatch):
    method = build()
    draws = [attach(method, monkeypatch, step=step).row_generator(8, 0).rand(3) for step in (0, 1)]
    method.plan = Plan(seed=1)
    draws.append(method.row_generator(8, 0).rand(3))
    assert len(torch.cat(draws).unique(dim=0)) == 24


def test_what_draws_globally_is_a_function_of_the_step(monkeypatch):
    method, draws = build(), []
    for step in (3, 4, 3):
        attach(method, monkeypatch, step=step).on_train_batch_start(([IMAGES], torch.zeros(4)), 0)
        draws.append(torch.rand(2).tolist())
        torch.rand(5)
    assert draws[0] == draws[2] != draws[1]


# Teachers ------------------------------------------------------------------------------------------------------------


class Taught(Mean):
    """A method that has a teacher and writes nothing to start it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.teacher = Teacher(self.encoder)
        self.started_as = {}

    def on_fit_start(self):
        self.started_as = copy.deepcopy(self.teacher.module.state_dict())


def test_weights_given_to_the_student_are_the_teachers_first_ones_although_no_method_says_so():
    method = Taught(Encoder("test_vit", 16, 8), RandomMasking(), OptimConfig())
    torch.nn.init.normal_(method.encoder.vit.cls_token)  # as --init fills it
    given = copy.deepcopy(method.encoder.state_dict())
    fit(method, 1)
    assert_equal_states(method.started_as, given)


# Length --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_steps", "text"), [(400, "20"), (100, "5.0"), (10, "0.50")])
def test_passes_are_written_as_precisely_as_the_run_is_long(max_steps, text):
    assert Plan(max_steps=max_steps, steps_per_epoch=10).epochs_at(max_steps // 2) == text


@pytest.mark.parametrize(("images", "batch_size"), [(1281167, 4096), (1024, 10), (7, 64), (3, 7), (10**6 + 3, 3)])
def test_an_epoch_ends_with_the_step_in_which_the_last_image_is_seen(images, batch_size):
    plan = Plan(steps_per_epoch=images / batch_size, batch_size=batch_size)
    for epoch in (0, 1, 2, 3, 299, 800):
        for step in {max(0, epoch * images // batch_size + shift) for shift in (-1, 0, 1)}:
            assert plan.epoch(step) == step * batch_size // images


def test_progress_is_the_share_of_steps_done(monkeypatch):
    assert attach(build(), monkeypatch, step=5).progress == 0.5


# Non-finite gradients ------------------------------------------------------------------------------------------------


def state_of(method, optimizer):
    return copy.deepcopy(method.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])


def assert_equal_states(left, right):
    assert torch.utils._pytree.tree_structure(left) == torch.utils._pytree.tree_structure(right)
    leaves = zip(*map(torch.utils._pytree.tree_leaves, (left, right)), strict=True)
    assert all(torch.equal(a, b) for a, b in leaves)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_loss_ends_the_run_at_its_step_with_clean_weights(value):
    method, before = build(), []
    method.poison = {2: value}

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            before.append(state_of(method, trainer.optimizers[0]))

    with pytest.raises(NonFiniteError, match="at step 3") as stop:
        fit(method, 5, callbacks=[Watch()])
    assert stop.value.step == 2
    assert_equal_states(state_of(method, method.trainer.optimizers[0]), before[2])


def test_a_fused_optimizer_skips_the_step_on_its_own(monkeypatch):
    # As on a GPU, where nobody looks before the next row of the log.
    method, states = build(), []
    method.poison = {2: math.nan}
    raise_if_nonfinite = method.raise_if_nonfinite
    monkeypatch.setattr(method, "raise_if_nonfinite", lambda: None)

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            states.append(state_of(method, trainer.optimizers[0]))

    fit(method, 5, callbacks=[Watch()])
    assert_equal_states(states[2], states[1])
    assert all(p.isfinite().all() for p in method.parameters())
    with pytest.raises(NonFiniteError, match="at step 3"):
        raise_if_nonfinite()


def test_the_first_of_several_bad_steps_is_named(monkeypatch):
    method = build()
    method.poison = {1: math.nan, 3: math.inf}
    monkeypatch.setattr(method, "raise_if_nonfinite", lambda: None)
    fit(method, 5)
    assert int(method.nonfinite_step) == 1


def test_one_bad_element_of_one_gradient_is_enough():
    method = build()
    optimizer = method.configure_optimizers()
    method.encoder(IMAGES).mean().backward()
    method.encoder.vit.norm.bias.grad[3] = math.nan
    with pytest.raises(NonFiniteError):
        method.on_before_optimizer_step(optimizer)
    assert optimizer.found_inf == 1


def test_a_bad_micro_batch_spoils_the_step_that_it_belongs_to():
    method = build()
    factors = iter([1.0, 1.0, math.nan, 1.0])
    method.encoder.vit.norm.weight.register_hook(lambda gradient: gradient * next(factors))
    with pytest.raises(NonFiniteError, match="at step 2"):
        fit(method, 3, accumulate_grad_batches=2)


@pytest.mark.parametrize("fused", [True, False])
def test_only_a_fused_optimizer_is_allowed_where_nobody_waits_for_the_gradient(fused, monkeypatch):
    """On a GPU the optimizer alone refuses a step that is not finite, and only a fused one knows how."""
    method = build()
    optimizer = torch.optim.AdamW(method.parameters(), fused=fused)
    method.encoder(IMAGES).mean().backward()
    monkeypatch.setattr(Method, "device", torch.device("cuda"))
    if fused:
        method.on_before_optimizer_step(optimizer)
        assert optimizer.found_inf == 0
    else:
        with pytest.raises(AssertionError, match="only a fused optimizer skips"):
            method.on_before_optimizer_step(optimizer)


def test_finite_steps_are_taken():
    method = build(warmup_epochs=0)
    before = copy.deepcopy(method.state_dict())
    fit(method, 2)
    method.raise_if_nonfinite()
    assert not any(torch.equal(p, before[name]) for name, p in method.named_parameters())


def test_the_mark_of_a_bad_step_is_not_part_of_a_checkpoint():
    assert "nonfinite_step" not in build().state_dict()


@pytest.mark.parametrize("images", [12, 48, 1000, 1281167])
@pytest.mark.parametrize("batch_size", [4, 256])
@pytest.mark.parametrize("epochs", [1, 7, 20, 300])
def test_measurements_after_every_epoch_carry_whole_numbers(images, batch_size, epochs):
    per_epoch = images / batch_size
    plan = Plan(max(1, round(epochs * per_epoch)), per_epoch, batch_size, asked=epochs)
    steps = sorted({min(plan.max_steps, max(1, round(per_epoch * number))) for number in range(1, epochs + 1)})
    passes = [plan.passes(step) for step in steps]
    assert passes[-1] == epochs
    assert all(number == int(number) for number in passes)
    assert len(set(passes)) == len(passes)


def test_a_measurement_within_an_epoch_says_where():
    plan = Plan(max_steps=400, steps_per_epoch=100, asked=4)
    assert [plan.passes(step) for step in (0, 25, 99, 100, 150, 400)] == [0, 0.25, 0.99, 1, 1.5, 4]

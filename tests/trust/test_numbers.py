"""The same run gives the same numbers; NaN, wherever it comes in, reaches nothing that learns, and can be repeated."""

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from strikes import ROOT, SETTINGS
from torch.utils.data import DataLoader

from mim.callbacks import NaNDump
from mim.cli import translate
from mim.methods import Method, NonFiniteError, Plan
from mim.run.config import instantiate, parse
from mim.run.folder import RunFolder

STEPS, BAD = 5, 2
GUIDED = ["class_path=AttentionMasking", "init_args.low=0.75", "init_args.high=0.75", "init_args.whole=0"]
METHODS = SETTINGS | {
    "momentum_mae": [*SETTINGS["mae"], "--model.class_path=MomentumMAE"]
    + [f"--model.init_args.masking.{setting}" for setting in GUIDED]
}


@pytest.fixture(params=METHODS)
def parts(request, monkeypatch):
    """Builds method and data of each of the five at the size of a test."""
    monkeypatch.chdir(ROOT)
    config = parse(translate(METHODS[request.param]))

    def build(seed=0):
        torch.manual_seed(seed)
        objects = instantiate(config)
        method, data = objects.model, objects.data
        method.plan = Plan(max_steps=STEPS, steps_per_epoch=2, batch_size=4)
        data.batch_size = 4
        data.open(method.encoder.img_size, method.encoder.in_chans, 0)
        return method, data

    return build


@pytest.fixture
def method(parts):
    """A method alone, with eight images to learn from."""
    return parts()[0]


def batches(method):
    """Views of random pixels, as the method's recipe cuts them."""
    views = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    count = 3 if hasattr(method, "centers") else 1
    return [(views[:count], torch.zeros(4, dtype=torch.long)) for _ in range(STEPS)]


class Poison(L.Callback):
    """Puts NaN into one thing at the start of one step."""

    def __init__(self, where):
        self.where, self.before = where, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx != BAD:
            return
        self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}
        if self.where == "input":
            batch[0][0][0, 0, 0, 0] = torch.nan
        elif self.where == "teacher":
            next(pl_module.teacher.parameters()).data.view(-1)[0] = torch.nan
        elif self.where == "centre":
            pl_module.centers[0, 0] = torch.nan

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.where == "gradient" and trainer.global_step == BAD:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.view(-1)[0] = torch.inf


def trainer_of(*callbacks, accumulate=1):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=list(callbacks),
        accumulate_grad_batches=accumulate,
        enable_model_summary=False,
        **quiet,
    )


def fit(method, where):
    poison = Poison(where)
    trainer_of(poison).fit(method, DataLoader(batches(method), batch_size=None))
    return poison


def places(method):
    return ["input", "gradient"] + ["teacher"] * hasattr(method, "teacher") + ["centre"] * hasattr(method, "centers")


def test_nan_anywhere_stops_the_run_before_the_optimizer(method):
    for where in places(method):
        torch.manual_seed(0)
        if where != "input":  # the one before has left its marks
            method.nonfinite_step.fill_(-1)
            method.suspect.fill_(False)
        with pytest.raises(NonFiniteError, match=rf"not finite at step {BAD + 1}: ") as stop:
            fit(method, where)
        assert stop.value.step == BAD
        for name, value in method.state_dict().items():
            if not name.startswith(("teacher", "centers")):
                assert value.isfinite().all(), (where, name)
        for tensor in (*method.parameters(), *method.buffers()):
            if tensor.is_floating_point():
                tensor.data.nan_to_num_(0.0)
        if hasattr(method, "mean_logits"):
            method.mean_logits.clear()


def test_nobody_takes_it_either_where_nobody_looks_until_later(method, monkeypatch):
    """As on a GPU, which is not waited for: the steps after the bad one run and change nothing, the teacher neither."""
    monkeypatch.setattr(Method, "raise_if_nonfinite", lambda self: None)
    poison = fit(method, "input")
    assert int(method.nonfinite_step) == BAD
    for name, value in method.state_dict().items():
        assert torch.equal(value, poison.before[name]), name


def test_two_runs_are_bit_equal(parts):
    states = []
    for disturbance in range(2):
        method, data = parts()
        torch.manual_seed(disturbance)  # nothing may draw from it
        trainer = trainer_of()
        trainer.fit(method, data)
        states.append(method.state_dict() | {"optimizer": trainer.optimizers[0].state_dict()["state"]})
    flat, other = (dict(enumerate(torch.utils._pytree.tree_leaves(state))) for state in states)
    assert len(flat) == len(other) > 100
    assert all(torch.equal(value, other[place]) for place, value in flat.items())


@pytest.mark.parametrize("parts", ["mae", "attmask"], indirect=True)
def test_the_dump_of_a_nan_replays_its_step_bit_for_bit(parts, tmp_path, monkeypatch):
    """In another object with other weights, micro-batch by micro-batch."""
    method, data = parts()
    honest, losses, accumulate = method.training_step, [], 2

    def poisoned(batch, batch_idx):
        loss = honest(batch, batch_idx)
        if method.global_step == BAD:
            losses.append(loss.detach())
            return loss * torch.nan
        return loss

    monkeypatch.setattr(method, "training_step", poisoned)
    run = RunFolder(tmp_path)
    with pytest.raises(NonFiniteError) as stop:
        trainer_of(NaNDump(run, data), accumulate=accumulate).fit(method, data)
    dump = torch.load(run.nan_dump(BAD), weights_only=True)
    assert dump["names"] == stop.value.names
    replayed, _ = parts(seed=1)
    replayed.load_state_dict(dump["state_dict"])
    replayed.plan, replayed.log, replayed.log_dict = Plan(**dump["plan"]), lambda *_: None, lambda *_: None
    facts = {"global_step": dump["step"], "world_size": dump["processes"], "global_rank": 0}
    replayed._trainer = SimpleNamespace(accumulate_grad_batches=dump["accumulate"], **facts)
    chunks = [torch.chunk(images, dump["accumulate"]) for images in (*dump["views"], dump["labels"])]
    for index, (*views, labels) in enumerate(zip(*chunks, strict=True)):
        replayed.on_train_batch_start((views, labels), index)
        assert torch.equal(replayed.train().training_step((views, labels), index), losses[index])
    assert len(losses) == accumulate


@pytest.mark.parametrize("parts", ["mae"], indirect=True)
def test_a_dump_that_cannot_be_written_does_not_hide_what_happened(parts, tmp_path, monkeypatch):
    method, data = parts()
    monkeypatch.setattr(method, "training_step", lambda *args: sum(p.sum() for p in method.parameters()) * torch.nan)
    # As on a full disk: something is written, then an OSError.
    monkeypatch.setattr(torch, "save", lambda state, path: path.write_bytes(b"half") and path.open("x"))
    run = RunFolder(tmp_path)
    with pytest.raises(NonFiniteError, match="not finite at step 1") as stop:
        trainer_of(NaNDump(run, data)).fit(method, data)
    assert len(stop.value.names) == 4
    assert not list(run.debug.iterdir())


@pytest.mark.parametrize("name", SETTINGS)
def test_all_state_of_a_method_is_in_its_checkpoint(name, monkeypatch):
    """Tensors that ``state_dict`` misses are listed here, each with the reason why it may."""
    monkeypatch.chdir(ROOT)
    method = instantiate(parse(translate(SETTINGS[name]))).model
    saved = {id(value) for value in method.state_dict(keep_vars=True).values()}
    # A checkpoint is never written while one of the first two is set; positions are a fixed table.
    allowed = {"nonfinite_step", "suspect", "positions"}
    for path, module in method.named_modules():
        for key, value in (*vars(module).items(), *module._buffers.items()):
            if isinstance(value, torch.Tensor) and id(value) not in saved and key not in allowed:
                constant = not value.requires_grad and Path(path).name in {"target", "masking"}
                assert constant, f"{path}.{key}"

"""The same run gives the same numbers; NaN, wherever it comes in, reaches nothing that learns, and can be repeated."""

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from recipes import ROOT, SETTINGS
from tiers import fast

from mim.callbacks import NaNDump
from mim.cli import translate
from mim.data.pretrain import PretrainData
from mim.methods import Method, NonFiniteError, Plan
from mim.run.config import instantiate, parse
from mim.run.folder import RunFolder

STEPS, BAD = 5, 2


@pytest.fixture(params=fast(SETTINGS, ("mae", "hpm", "attmask", "ijepa")))
def parts(request, monkeypatch):
    """Builds method and data of every recipe at the size of a test."""
    monkeypatch.chdir(ROOT)
    config = parse(translate(SETTINGS[request.param]))

    def build(seed=0):
        torch.manual_seed(seed)
        objects = instantiate(config)
        method, data = objects.model, objects.data
        method.plan = Plan(max_steps=STEPS, steps_per_epoch=2, batch_size=4)
        data.batch_size = 4
        data.open(method.encoder.img_size, method.encoder.in_chans, 0)
        return method, data

    return build


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
        elif self.where != "gradient":
            pl_module.state_dict()[self.where].view(-1)[0] = torch.nan

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


def fit(method, data, where):
    poison = Poison(where)
    trainer_of(poison).fit(method, data)
    return poison


def places(method):
    """Where NaN may come in: images, a gradient, and the first tensor of each part that is kept but not trained."""
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    kept = [name for name, value in method.state_dict().items() if value.is_floating_point() and name not in trained]
    parts = {name.partition(".")[0]: name for name in reversed(kept) if not name.startswith("encoder.")}
    return ["input", "gradient", *parts.values()]


def test_nan_anywhere_stops_the_run_before_the_optimizer(parts):
    for where in places(parts()[0]):
        method, data = parts()
        with pytest.raises(NonFiniteError, match=rf"not finite at step {BAD + 1}: ") as stop:
            fit(method, data, where)
        assert stop.value.step == BAD
        for name, value in method.state_dict().items():
            if name.partition(".")[0] != where.partition(".")[0]:
                assert value.isfinite().all(), (where, name)


def test_steps_after_a_nan_change_nothing_where_nobody_looks_until_later(parts, monkeypatch):
    """As on a GPU, which is not waited for: the steps after the bad one run and change nothing, the teacher neither."""
    monkeypatch.setattr(Method, "raise_if_nonfinite", lambda self: None)
    method, data = parts()
    poison = fit(method, data, "input")
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


def with_nodata(data, folder):
    """The same settings for images of which the first two that a step sees lack a corner."""
    other = PretrainData(str(folder / "images"), data.views, batch_size=4, num_workers=0)
    (folder / "images").mkdir()
    for number in range(4):
        values = np.random.default_rng(number).uniform(1, 2, (40, 40, 3)).astype(np.float32)
        values[:20, :30] = np.nan if number < 2 else 1.5
        np.save(folder / "images" / f"{number}.npy", values)
    other.open(data.views.size, 3, data.seed)
    other.check()
    return other


@pytest.mark.parametrize("nodata", [False, True])
@pytest.mark.parametrize("parts", ["mae", "attmask"], indirect=True)
def test_the_dump_of_a_nan_replays_its_step_bit_for_bit(parts, nodata, tmp_path, monkeypatch):
    """In another object with other weights, micro-batch by micro-batch."""
    method, data = parts()
    if nodata:  # in one of the two micro-batches
        data = with_nodata(data, tmp_path)
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
    assert ("valid" in dump) == nodata
    parts = [[torch.chunk(own, accumulate) for own in dump[key]] for key in ("views", "valid") if key in dump]
    for index, labels in enumerate(torch.chunk(dump["labels"], accumulate)):
        views, *valid = ([chunks[index] for chunks in own] for own in parts)
        masks = [own for own in valid if not all(mask.all() for mask in own)]  # none where all was measured
        replayed.on_train_batch_start((views, labels), index)
        assert torch.equal(replayed.train().training_step((views, labels, *masks), index), losses[index])
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
    allowed = {"nonfinite_step", "skip_step", "positions"}
    if name == "dinov2":
        allowed.add("centers")  # Sinkhorn-Knopp reads none
    for path, module in method.named_modules():
        for key, value in (*vars(module).items(), *module._buffers.items()):
            if isinstance(value, torch.Tensor) and id(value) not in saved and key not in allowed:
                constant = not value.requires_grad and path.partition(".")[0] in {"target", "masking"}
                assert constant, f"{path}.{key}"

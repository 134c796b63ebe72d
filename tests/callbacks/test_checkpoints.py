"""When checkpoints are written: at fixed steps and at signals, always between two steps, never with NaN inside."""

import math
import os
import signal

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from mim.callbacks import Checkpoints
from mim.callbacks.checkpoints import Signals
from mim.distributed.processes import STOP_SIGNALS as SIGNALS
from mim.encoder import Encoder
from mim.masking import RandomMasking
from mim.methods import Method, NonFiniteError, OptimConfig, Plan
from mim.run.checkpoint_files import AtomicCheckpointIO, checkpoint_step, checkpoints, newest_good, verify

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Mean(Method):
    """Pulls the mean of the tokens to zero; ``events``, by micro-batch, happen in the middle of one."""

    def training_step(self, batch, batch_idx):
        (images,), _ = batch
        loss = self.encoder(images).square().mean()
        return self.events.get(batch_idx, lambda loss: loss)(loss)


class Saved(L.Callback):
    """Notes which checkpoints stand after each step."""

    def __init__(self, folder):
        self.folder, self.steps = folder, []

    def on_train_batch_end(self, *_):
        new = [checkpoint_step(path) for path in checkpoints(self.folder)]
        self.steps += [step for step in new if step not in self.steps]


def fit(folder, every=2, steps=6, events=None, accumulate=1, resume=None, others=()):
    torch.manual_seed(0)
    kwargs = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    method = Mean(Encoder("test_vit", 16, 8, kwargs=kwargs), RandomMasking(), OptimConfig(warmup_epochs=0))
    method.events, method.plan = events or {}, Plan(max_steps=steps)
    signals = Signals()
    callback, saved = Checkpoints(folder, every, signals), Saved(folder)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=[signals, *others, callback, saved],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    first = checkpoint_step(resume) if resume else 0
    loader = DataLoader([([IMAGES], torch.zeros(2))] * ((steps - first) * accumulate), batch_size=None)
    trainer.saved, trainer.checkpoints, trainer.signals = saved, callback, signals
    trainer.fit(method, loader, ckpt_path=resume, weights_only=True)
    return trainer


def send(number):
    def event(loss):
        os.kill(os.getpid(), number)
        return loss

    return event


def test_checkpoints_come_every_so_many_steps_and_after_the_last(tmp_path):
    assert fit(tmp_path, every=2, steps=5).saved.steps == [2, 4, 5]


def test_the_newest_two_remain(tmp_path):
    fit(tmp_path, every=1, steps=5)
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == [4, 5]


def test_steps_count_and_not_micro_batches(tmp_path):
    assert fit(tmp_path, every=2, steps=4, accumulate=3).saved.steps == [2, 4]


def test_a_checkpoint_holds_weights_optimizer_and_step(tmp_path):
    trainer = fit(tmp_path, every=10, steps=3)
    path, _ = newest_good(tmp_path)
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    assert checkpoint["global_step"] == 3
    weights = trainer.lightning_module.state_dict()
    assert checkpoint["state_dict"].keys() == weights.keys()
    assert all(torch.equal(checkpoint["state_dict"][name], weights[name]) for name in weights)
    assert {float(state["step"]) for state in checkpoint["optimizer_states"][0]["state"].values()} == {3.0}


def test_a_resumed_run_ends_with_the_weights_of_a_whole_one(tmp_path):
    whole = fit(tmp_path / "whole", every=3, steps=6).lightning_module.state_dict()
    path = sorted((tmp_path / "whole").glob("*.ckpt"))[1]
    assert checkpoint_step(path) == 3
    trainer = fit(tmp_path / "resumed", every=3, steps=6, resume=path)
    assert trainer.saved.steps == [6]  # not once more the one it started from
    assert all(torch.equal(value, whole[name]) for name, value in trainer.lightning_module.state_dict().items())


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_the_step_that_it_came_in(tmp_path, number):
    trainer = fit(tmp_path, every=100, steps=6, events={2: send(number)})
    assert trainer.global_step == 3
    assert (trainer.signals.received, trainer.checkpoints.stopped) == (number, True)
    path, _ = newest_good(tmp_path)
    assert checkpoint_step(path) == 3


def test_a_signal_between_micro_batches_waits_for_the_end_of_the_step(tmp_path):
    trainer = fit(tmp_path, every=100, steps=6, accumulate=3, events={3: send(signal.SIGTERM)})
    assert trainer.global_step == 2
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == [2]


def test_a_signal_while_others_prepare_ends_the_run_after_its_first_step(tmp_path):
    class Slow(L.Callback):
        def on_train_start(self, *_):
            send(signal.SIGTERM)(None)

    trainer = fit(tmp_path, every=100, others=[Slow()])
    assert (trainer.global_step, trainer.checkpoints.stopped) == (1, True)
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == [1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_loaders_are_made_ends_the_run_after_its_first_step(tmp_path, number):
    class Opened(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            setup = trainer.fit_loop.setup_data
            trainer.fit_loop.setup_data = lambda: (send(number)(None), setup())

    trainer = fit(tmp_path, every=100, others=[Opened()])
    assert (trainer.global_step, trainer.signals.received) == (1, number)
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == [1]


def test_a_run_without_signals_does_not_say_that_it_was_stopped(tmp_path):
    trainer = fit(tmp_path, steps=2)
    assert (trainer.signals.received, trainer.checkpoints.stopped) == (None, False)


def test_signal_handlers_are_given_back(tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS]
    fit(tmp_path, steps=2)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_signal_handlers_are_given_back_after_a_failure(tmp_path):
    def fail(loss):
        raise RuntimeError("broken")

    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, events={1: fail})
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_nonfinite_step_is_never_saved(tmp_path):
    with pytest.raises(NonFiniteError):
        fit(tmp_path, every=1, steps=5, events={2: lambda loss: loss * math.nan})
    path, refused = newest_good(tmp_path)
    assert (checkpoint_step(path), refused) == (2, [])
    weights = AtomicCheckpointIO().load_checkpoint(path)["state_dict"].values()
    assert all(weight.isfinite().all() for weight in weights)


def test_a_nonfinite_step_that_was_not_looked_at_yet_is_never_saved(tmp_path, monkeypatch):
    # As on a GPU: the step was skipped, and the mark is read when a checkpoint is due.
    look, calls = Method.raise_if_nonfinite, []
    monkeypatch.setattr(Method, "on_before_optimizer_step", mark_bad(2))
    monkeypatch.setattr(Method, "raise_if_nonfinite", lambda method: (calls.append(method.global_step), look(method)))
    with pytest.raises(NonFiniteError):
        fit(tmp_path, every=2, steps=6)
    assert calls == [2, 4]  # not at every step
    assert checkpoint_step(newest_good(tmp_path)[0]) == 2


def mark_bad(step):
    def mark(method, optimizer):
        if method.global_step == step:
            method.nonfinite_step.fill_(step)

    return mark


def test_what_a_killed_process_left_is_swept_at_the_start(tmp_path):
    (tmp_path / ".step-00000004.ckpt.99.tmp").write_bytes(b"half")
    fit(tmp_path, steps=2)
    assert list(tmp_path.glob(".*")) == []
    assert [verify(path) for path in checkpoints(tmp_path)] == [None]

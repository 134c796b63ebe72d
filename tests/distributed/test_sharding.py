"""FSDP2 of every method in one process: parameters are sharded, gathered for the step and saved whole."""

import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed
from recipes import ROOT, SETTINGS
from strikes import final_state
from torch.distributed.tensor import DTensor

from mim.callbacks import Checkpoints
from mim.cli import main

ONE_STEP = ["--epochs", "0.015625", "--eval_every", "1", "--pictures", "0", "--probe_images", "12"]
MARKS = {"attmask": ()}
"""The method with most state is tried with every run of the tests, the others with the middle ones."""
ONE = ["--devices", "1", "--trainer.accelerator", "cpu"]


@pytest.fixture(autouse=True)
def _alone_again():
    """Commands of later tests must not meet the processes of this one at its port."""
    with patch.dict(os.environ):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, pytest.mark.middle)) for name in SETTINGS])
def test_a_sharded_step_saves_the_weights_of_an_ordinary_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    kinds, save = {}, Checkpoints.on_train_batch_end

    def note(self, trainer, method, *args):
        kinds[trainer.strategy.__class__.__name__] = {isinstance(p, DTensor) for p in method.parameters()}
        return save(self, trainer, method, *args)

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", note)
    for folder, strategy in (("ordinary", "auto"), ("sharded", "fsdp")):
        out = ["--out", str(tmp_path / folder), "--strategy", strategy]
        assert main("pretrain", [*SETTINGS[name], *ONE_STEP, *ONE, *out]) == 0
    assert kinds == {"SingleDeviceStrategy": {False}, "ShardedStrategy": {True}}
    ordinary, sharded = (final_state(tmp_path / folder)["state_dict"] for folder in ("ordinary", "sharded"))
    assert ordinary.keys() == sharded.keys()
    for key, value in ordinary.items():
        torch.testing.assert_close(sharded[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")

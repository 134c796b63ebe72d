"""Two processes: the same result as one, an end for all when one dies, and no image lost or seen twice."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from strikes import ROOT, SETTINGS, checkpoints, family, finish, orphans, start, wait_for_steps

pytestmark = pytest.mark.slow
TWO = ["--devices", "2", "--trainer.accelerator", "cpu"]
EXACT = ["--model.init_args.encoder.drop_path_rate", "0"]
FREE = (".attn.qkv.bias", "difficulty.norm.bias", "difficulty.predict.bias")
"""Weights that cannot change the loss: their gradient is rounding noise, which AdamW blows up to whole steps."""


@pytest.mark.parametrize("method", SETTINGS)
def test_two_processes_equal_one_with_the_same_global_batch(method, tmp_path):
    """Every parameter and buffer to 1e-6, in float32; sums are taken in another order, so bit-equality cannot be."""
    assert finish(*SETTINGS[method], *EXACT, "--out", tmp_path / "one")[0] == 0
    status, output = finish(*SETTINGS[method], *EXACT, *TWO, "--out", tmp_path / "two")
    assert status == 0, output
    one, two = (torch.load(checkpoints(tmp_path / run)[-1], weights_only=True)["state_dict"] for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        other = two[name]
        if name.endswith(FREE[0]):
            value, other = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (value, other))
        if not name.endswith(FREE[1:]):
            torch.testing.assert_close(value, other, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("who", [0, 1], ids=["the first", "the second"])
def test_a_process_that_is_killed_ends_all_within_a_minute(who, tmp_path):
    process = start(*SETTINGS["attmask"], *TWO, "--epochs", "50", "--save_every", "1", "--out", tmp_path / "run")
    wait_for_steps(process, 2)
    kin = family(process.pid)
    began = time.monotonic()
    os.kill([process.pid, kin[0]][who], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0, output
    assert orphans(kin, patience=60 - (time.monotonic() - began)) == []


@pytest.mark.parametrize("to", ["all", "the first", "the second"])
def test_a_signal_to_any_of_them_saves_and_ends_with_75(to, tmp_path):
    process = start(*SETTINGS["mae"], *TWO, "--epochs", "50", "--save_every", "50", "--out", tmp_path / "run")
    wait_for_steps(process, 3)
    ranks = {"all": [process.pid, *family(process.pid)[:1]], "the first": [process.pid]}
    for pid in ranks.get(to, family(process.pid)[:1]):
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert len(checkpoints(tmp_path / "run")) == 1


def test_torchrun_starts_the_same_run(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = [*SETTINGS["mae"], *TWO, "--out", str(tmp_path / "run")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "tools/pretrain.py", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run" / "report.html").exists()

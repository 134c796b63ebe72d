"""Methods with a teacher, driven as a user drives them: AttMask, with centres and views of its own, and HPM."""

import csv
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch
from strikes import ROOT, checkpoints, differences, final_state, start, wait_for_steps

from mim.cli import main
from mim.run.weights import init_backbone

# Too few images of each class for probes, which would take longer than the run.
ATTMASK = ["--config", str(ROOT / "tests" / "tiny-ibot.yaml"), "--probe_images", "40"]
HPM = ["--config", str(ROOT / "tests" / "tiny_hpm.yaml"), "--probe_images", "40"]
HPM += ["--model.init_args.encoder.drop_path_rate", "0"]


def train(config, out, *args):
    return main("pretrain", [*config, "--out", str(out), *map(str, args)])


def rows(run):
    with Path(run, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(run):
    return [float(row["train/loss"]) for row in rows(run) if row["train/loss"]]


def trained(config, folder):
    """An uninterrupted run."""
    torch.set_num_threads(1)
    assert train(config, folder) == 0
    return folder


@pytest.fixture(scope="module")
def attmask(tmp_path_factory):
    return trained(ATTMASK, tmp_path_factory.mktemp("attmask") / "whole")


@pytest.fixture(scope="module")
def hpm(tmp_path_factory):
    return trained(HPM, tmp_path_factory.mktemp("hpm") / "whole")


def test_teacher_centers_and_schedules_survive_a_kill_bit_exactly(attmask, tmp_path):
    out = tmp_path / "run"
    process = start(*ATTMASK, "--out", out, "--num_workers", 2)
    wait_for_steps(process, 5)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert main("pretrain", ["--resume", str(out), "--num_workers", "0"]) == 0
    assert differences(attmask, out) == []
    state = final_state(out)["state_dict"]
    assert state["centers"].any()
    assert not torch.equal(state["encoder.vit.norm.weight"], state["teacher.module.encoder.vit.norm.weight"])


def test_the_teacher_is_what_is_exported_and_what_another_run_starts_from(attmask, tmp_path):
    vit = timm.create_model(f"local-dir:{attmask / 'export' / 'backbone'}", pretrained=True)
    state = final_state(attmask)["state_dict"]
    for name, value in vit.state_dict().items():
        assert torch.equal(value, state[f"teacher.module.encoder.vit.{name}"]), name
    init_backbone(other := timm.create_model("test_vit", img_size=32, patch_size=8), str(checkpoints(attmask)[-1]))
    assert torch.equal(other.norm.weight, vit.norm.weight)
    assert main("export", ["--run", str(attmask), "--out", str(tmp_path / "student"), "--student", "true"]) == 0
    student = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    assert torch.equal(student.norm.weight, state["encoder.vit.norm.weight"])


def test_guided_masks_go_on_bit_exactly_with_other_workers(hpm, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(hpm, out, symlinks=True)
    checkpoints(out)[-1].unlink()
    assert main("pretrain", ["--resume", str(out), "--num_workers", "2"]) == 0
    assert differences(hpm, out) == []
    shown = rows(out)[-1]
    assert float(shown["health/hard_share"]) == pytest.approx(5 / 12)  # int(12 * 0.5 * 23 / 24) of 12
    assert {"train/difficulty", "health/rank_correlation", "health/error_over_random"} <= shown.keys()


def largest_difference(run, other):
    """Over all weights but those that cannot change the loss: AdamW blows their rounding errors up.

    These are the biases of keys, and whatever adds a constant to all difficulties, of which only the order counts.
    """
    first, second = (final_state(folder)["state_dict"] for folder in (run, other))
    largest = 0.0
    for name, value in first.items():
        if name.endswith(("difficulty.norm.bias", "difficulty.predict.bias")):
            continue
        difference = (value - second[name]).abs()
        if name.endswith("qkv.bias"):
            difference = torch.cat([difference.chunk(3)[0], difference.chunk(3)[2]])
        largest = max(largest, float(difference.max()))
    return largest


def test_accumulation_equals_the_whole_batch(hpm, tmp_path):
    """Gradients are averaged in another order: equal to rounding."""
    assert train(HPM, tmp_path / "four", "--accumulate", 4) == 0
    assert largest_difference(hpm, tmp_path / "four") < 1e-6


def test_a_teacher_and_its_centers_are_the_same_on_two_processes_and_over_micro_batches(attmask, tmp_path):
    """Sums are taken in another order: equal to rounding only, 1e-6 after 12 AdamW steps (weights up to 1)."""
    process = start(*ATTMASK, "--out", tmp_path / "two", "--devices", 2, "--trainer.accelerator", "cpu")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert train(ATTMASK, tmp_path / "four", "--accumulate", 4) == 0
    for other in (tmp_path / "two", tmp_path / "four"):
        assert largest_difference(attmask, other) < 1e-6
        first, second = (final_state(run)["state_dict"]["centers"] for run in (attmask, other))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert losses(attmask) == pytest.approx(losses(tmp_path / "two"), abs=1e-5)

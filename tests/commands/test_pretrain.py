"""The main job, driven as a user drives it."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from torchvision.transforms.v2.functional import to_pil_image

from mim.cli import main

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "tiny.yaml")
TINY_HPM = str(ROOT / "tests" / "tiny_hpm.yaml")  # as TINY, with a teacher that guides the masks


def train(out, *args, config=TINY):
    return main("pretrain", ["--config", config, "--out", str(out), *map(str, args)])


def last_checkpoint(run):
    return max(Path(run, "checkpoints").glob("step-*.ckpt"))


def final_state(run):
    return torch.load(last_checkpoint(run), weights_only=True)


def losses(run):
    return [float(row["train/loss"]) for row in rows(run) if row["train/loss"]]


def rows(run):
    with Path(run, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def leaves(tree, name=""):
    """Every value of a nested state under its path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{name}.{key}")
    elif isinstance(tree, list | tuple):
        for key, value in enumerate(tree):
            yield from leaves(value, f"{name}.{key}")
    else:
        yield name, tree


def assert_bit_identical(run, other):
    """Weights, optimizer, loop counters and metrics."""
    first, second = dict(leaves(final_state(run))), dict(leaves(final_state(other)))
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, name
    assert Path(run, "metrics.csv").read_bytes() == Path(other, "metrics.csv").read_bytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(folder) == 0
    return folder


def test_a_run_leaves_everything_it_promises(run):
    names = (
        "config.yaml metrics.csv summary.json report.html command.txt env.txt log.txt tensorboard images checkpoints"
    )
    for name in (*names.split(), "export/backbone/config.json", "export/backbone/model.safetensors"):
        assert (run / name).exists(), name
    assert not (run / "bad_files.txt").exists()
    assert len(list((run / "images").glob("epoch_*.png"))) == 3  # untrained, in between, at the end


def test_the_loss_falls(run):
    history = losses(run)
    assert len(history) == 24
    assert sum(history[-4:]) < 0.95 * sum(history[:4])


def test_probes_and_health_are_measured_from_the_untrained_encoder_on(run):
    measured = [row for row in rows(run) if row["val/rankme"]]
    assert [int(row["step"]) for row in measured] == [0, 13, 24]
    assert all(row["val/knn_top1"] and row["val/linear_top1"] and row["val/feature_std"] for row in measured)


def test_the_summary_compares_with_untrained_encoders_over_seeds(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done"
    assert len(summary["probe"]["linear"]["trained"]) == len(summary["probe"]["linear"]["untrained"]) == 3
    assert summary["steps"] == 24


def test_timm_alone_loads_the_backbone_with_the_trained_weights(run):
    vit = timm.create_model(f"local-dir:{run / 'export' / 'backbone'}", pretrained=True).eval()
    trained = final_state(run)["state_dict"]
    for name, value in vit.state_dict().items():
        assert torch.equal(value, trained[f"encoder.vit.{name}"]), name
    assert vit.pretrained_cfg["input_size"] == (3, 32, 32)


def test_the_saved_config_repeats_the_run(run, tmp_path):
    assert train(tmp_path / "again", config=str(run / "config.yaml")) == 0
    assert_bit_identical(run, tmp_path / "again")


def test_a_finished_run_resumes_to_nothing(run, capsys):
    before = final_state(run)["state_dict"]
    assert main("pretrain", ["--resume", str(run)]) == 0
    assert all(torch.equal(value, before[name]) for name, value in final_state(run)["state_dict"].items())


def test_workers_do_not_change_the_weights(run, tmp_path):
    assert train(tmp_path / "run", "--num_workers", 2) == 0
    assert_bit_identical(run, tmp_path / "run")


def test_a_teacher_is_stopped_resumed_and_repeated_bit_exactly(tmp_path):
    config, out = TINY_HPM, tmp_path / "run"
    assert train(tmp_path / "whole", config=config) == 0
    assert strike(start("--config", config, "--out", out, "--num_workers", 2), signal.SIGTERM, after=3) == 75
    assert main("pretrain", ["--resume", str(out), "--num_workers", "0"]) == 0
    assert_bit_identical(tmp_path / "whole", out)
    shown = rows(out)[-1]
    assert float(shown["health/hard_share"]) == pytest.approx(5 / 12)  # int(12 * 0.5 * 23 / 24) of 12
    assert {"train/difficulty", "health/rank_correlation", "health/error_over_random"} <= shown.keys()


def start(*args, cwd=ROOT):
    command = [sys.executable, str(ROOT / "tools" / "pretrain.py"), *map(str, args)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: sums in another order round differently
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=one_thread, **pipe)


def strike(process, number, after):
    """Waits for some lines of progress, sends a signal, returns the exit status."""
    seen = 0
    for line in process.stdout:
        seen += " step " in line and "loss" in line
        if seen == after:
            break
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


def test_a_signal_saves_the_step_exits_75_and_resumes_bit_exactly(run, tmp_path):
    out = tmp_path / "run"
    assert strike(start("--config", TINY, "--out", out, "--num_workers", 2), signal.SIGTERM, after=1) == 75
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
    assert main("pretrain", ["--resume", str(out), "--num_workers", "0"]) == 0
    assert_bit_identical(run, out)


def test_sigkill_and_resume_bit_exactly(run, tmp_path):
    out = tmp_path / "run"
    assert strike(start("--config", TINY, "--out", out), signal.SIGKILL, after=1) == -signal.SIGKILL
    assert strike(start("--resume", out), signal.SIGKILL, after=1) == -signal.SIGKILL
    assert main("pretrain", ["--resume", str(out)]) == 0
    assert_bit_identical(run, out)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ten_sigkills_and_resumes_are_bit_exact(run, tmp_path, workers):
    import random

    chance = random.Random(workers)
    for trial in range(4):
        out = tmp_path / f"run{trial}"
        arguments = ["--config", TINY, "--out", out, "--num_workers", workers]
        for _ in range(3):
            process = start(*arguments)
            arguments = ["--resume", out]
            for _ in range(chance.randint(8, 16)):
                process.stdout.readline()
            time.sleep(chance.random() * 0.5)
            process.kill()
            process.communicate()
        assert main("pretrain", ["--resume", str(out)]) == 0
        assert_bit_identical(run, out)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out, symlinks=True)
    newest = last_checkpoint(out)
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    assert main("pretrain", ["--resume", str(out)]) == 0
    assert f"{newest} is damaged" in capsys.readouterr().out
    assert_bit_identical(run, out)


def test_resume_auto_starts_and_then_continues(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert strike(start("--config", TINY, "--out", out, "--resume", "auto"), signal.SIGINT, after=1) == 75
    assert train(out, "--resume", "auto") == 0
    assert_bit_identical(run, out)


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


def test_accumulation_equals_the_whole_batch(tmp_path):
    """Gradients are averaged in another order: equal to rounding."""
    exact = ["--model.init_args.encoder.drop_path_rate", 0]
    assert train(tmp_path / "one", *exact, config=TINY_HPM) == 0
    assert train(tmp_path / "four", *exact, "--accumulate", 4, config=TINY_HPM) == 0
    assert largest_difference(tmp_path / "one", tmp_path / "four") < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        ["--precision", "bf16-mixed"],
        ["--model.init_args.encoder.grad_checkpointing", "true"],
        ["--trainer.gradient_clip_val", "1.0"],
        ["--pool", "cls"],
        ["--in_chans", "1"],
        ["--img_size", "[32, 48]"],
    ],
    ids=lambda settings: settings[0].split(".")[-1].lstrip("-"),
)
def test_lightnings_settings_train_to_the_end(tmp_path, settings):
    if settings[0] == "--in_chans":  # the generated shapes are RGB
        from mim.commands.make_shapes import run as make_shapes

        make_shapes(tmp_path / "shapes", train=40, val=20, size=32)
        settings = [*settings, "--data", tmp_path / "shapes" / "train" / "images"]
    assert train(tmp_path / "run", "--epochs", 0.1, "--pictures", 1, "--probe_images", 40, *settings) == 0


@pytest.mark.slow
def test_compiled_blocks_train_and_export(tmp_path):
    assert train(tmp_path / "run", "--epochs", 0.1, "--compile") == 0
    assert (tmp_path / "run" / "export" / "backbone" / "model.safetensors").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again_from_its_initial_weights(tmp_path):
    assert train(tmp_path / "first", "--epochs", 0.1) == 0
    start_from = ["--init", tmp_path / "first" / "export" / "backbone", "--epochs", 0.1]
    assert train(tmp_path / "whole", *start_from) == 0
    assert train(tmp_path / "killed", *start_from) == 0
    for checkpoint in (tmp_path / "killed" / "checkpoints").iterdir():
        checkpoint.unlink()
    assert main("pretrain", ["--resume", str(tmp_path / "killed")]) == 0
    assert_bit_identical(tmp_path / "whole", tmp_path / "killed")


def test_labels_of_single_images_do_not_stop_a_run(tmp_path, capsys):
    """One folder per photo is a habit of people and of ImageNet samples: nothing to probe, but enough to learn from."""
    for number in range(12):
        folder = tmp_path / "photos" / f"class{number}"
        folder.mkdir(parents=True)
        pixels = torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        to_pil_image(pixels).save(folder / "photo.png")
    assert train(tmp_path / "run", "--data", tmp_path / "photos", "--epochs", 2) == 0
    assert "12 labels, too few images of each for probes" in capsys.readouterr().out


# A method with a teacher, centres and views that are finished on the device -------------------------------------------

TAUGHT = str(ROOT / "tests" / "tiny-ibot.yaml")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("taught") / "whole"
    assert train(folder, config=TAUGHT) == 0
    return folder


def test_teacher_centers_and_schedules_survive_a_kill_bit_exactly(taught, tmp_path):
    out = tmp_path / "run"
    assert (
        strike(start("--config", TAUGHT, "--out", out, "--num_workers", 2), signal.SIGKILL, after=5) == -signal.SIGKILL
    )
    assert main("pretrain", ["--resume", str(out), "--num_workers", "0"]) == 0
    assert_bit_identical(taught, out)
    state = final_state(out)["state_dict"]
    assert state["centers"].any()
    assert not torch.equal(state["encoder.vit.norm.weight"], state["teacher.module.encoder.vit.norm.weight"])


def test_the_teacher_is_what_is_exported_and_what_another_run_starts_from(taught, tmp_path):
    vit = timm.create_model(f"local-dir:{taught / 'export' / 'backbone'}", pretrained=True)
    state = final_state(taught)["state_dict"]
    for name, value in vit.state_dict().items():
        assert torch.equal(value, state[f"teacher.module.encoder.vit.{name}"]), name
    from mim.checkpoint import init_backbone

    init_backbone(other := timm.create_model("test_vit", img_size=32, patch_size=8), str(last_checkpoint(taught)))
    assert torch.equal(other.norm.weight, vit.norm.weight)
    assert main("export", ["--run", str(taught), "--out", str(tmp_path / "student"), "--student", "true"]) == 0
    student = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    assert torch.equal(student.norm.weight, state["encoder.vit.norm.weight"])


def test_a_teacher_and_its_centers_are_the_same_on_two_processes_and_over_micro_batches(taught, tmp_path):
    """Sums are taken in another order: equal to rounding only, 1e-6 after 12 AdamW steps (weights up to 1)."""
    process = start("--config", TAUGHT, "--out", tmp_path / "two", "--devices", 2, "--trainer.accelerator", "cpu")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert train(tmp_path / "four", "--accumulate", 4, config=TAUGHT) == 0
    for other in (tmp_path / "two", tmp_path / "four"):
        assert largest_difference(taught, other) < 1e-6
        first, second = (final_state(run)["state_dict"]["centers"] for run in (taught, other))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert losses(taught) == pytest.approx(losses(tmp_path / "two"), abs=1e-5)

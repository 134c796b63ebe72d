"""The main job, driven as a user drives it; methods with a teacher are in ``test_pretrain_teachers.py``."""

import csv
import json
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch
from strikes import ROOT, checkpoints, differences, final_state, start, wait_for_steps
from torchvision.transforms.v2.functional import to_pil_image

from mim.cli import main

# Too few images of each class for probes, which would take longer than the run.
TINY = ["--config", str(ROOT / "tests" / "tiny.yaml"), "--probe_images", "40"]


def train(out, *args):
    return main("pretrain", [*TINY, "--out", str(out), *map(str, args)])


def rows(run):
    with Path(run, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(folder) == 0
    return folder


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A short one with probes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("probed") / "run"
    assert train(folder, "--epochs", 0.1, "--probe_images", 60) == 0
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
    history = [float(row["train/loss"]) for row in rows(run) if row["train/loss"]]
    assert len(history) == 24
    assert sum(history[-4:]) < 0.95 * sum(history[:4])


def test_health_is_measured_from_the_untrained_encoder_on(run):
    measured = [row for row in rows(run) if row["val/rankme"]]
    assert [int(row["step"]) for row in measured] == [0, 13, 24]
    assert all(row["val/feature_std"] for row in measured)


def test_probes_are_measured_from_the_untrained_encoder_on(probed):
    measured = [row for row in rows(probed) if row["val/knn_top1"] and row["val/linear_top1"]]
    assert [int(row["step"]) for row in measured] == [0, 6]


def test_the_summary_compares_with_untrained_encoders_over_seeds(probed):
    summary = json.loads((probed / "summary.json").read_text())
    assert summary["status"] == "done"
    assert len(summary["probe"]["linear"]["trained"]) == len(summary["probe"]["linear"]["untrained"]) == 3
    assert summary["steps"] == 6


def test_timm_alone_loads_the_backbone_with_the_trained_weights(run):
    vit = timm.create_model(f"local-dir:{run / 'export' / 'backbone'}", pretrained=True).eval()
    trained = final_state(run)["state_dict"]
    for name, value in vit.state_dict().items():
        assert torch.equal(value, trained[f"encoder.vit.{name}"]), name
    assert vit.pretrained_cfg["input_size"] == (3, 32, 32)


def test_the_saved_config_repeats_the_run(run, tmp_path):
    assert main("pretrain", ["--config", str(run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert differences(run, tmp_path / "again") == []


def test_a_finished_run_resumes_to_nothing(run, capsys):
    before = final_state(run)["state_dict"]
    assert main("pretrain", ["--resume", str(run)]) == 0
    assert all(torch.equal(value, before[name]) for name, value in final_state(run)["state_dict"].items())


def test_workers_do_not_change_the_weights(run, tmp_path):
    assert train(tmp_path / "run", "--num_workers", 2) == 0
    assert differences(run, tmp_path / "run") == []


def test_a_run_that_was_killed_then_stopped_then_resumed_ends_bit_exactly(run, tmp_path):
    out, args = tmp_path / "run", ["--resume", "auto"]
    strikes = [(signal.SIGKILL, -signal.SIGKILL, 6), (signal.SIGTERM, 75, 2), (signal.SIGINT, 75, 1)]
    for workers, (number, status, steps) in zip((0, 2, 0), strikes, strict=True):
        process = start(*TINY, "--out", out, *args, "--num_workers", workers)
        wait_for_steps(process, steps)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == status
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
    assert train(out, *args) == 0
    assert differences(run, out) == []


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out, symlinks=True)
    newest = checkpoints(out)[-1]
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    assert main("pretrain", ["--resume", str(out)]) == 0
    assert f"{newest} is damaged" in capsys.readouterr().out
    assert differences(run, out) == []


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
    assert train(tmp_path / "run", "--epochs", 0.1, "--pictures", 1, *settings) == 0


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
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


def test_labels_of_single_images_do_not_stop_a_run(tmp_path, capsys):
    """One folder per photo is a habit of people and of ImageNet samples: nothing to probe, but enough to learn from."""
    for number in range(12):
        folder = tmp_path / "photos" / f"class{number}"
        folder.mkdir(parents=True)
        pixels = torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        to_pil_image(pixels).save(folder / "photo.png")
    assert train(tmp_path / "run", "--data", tmp_path / "photos", "--epochs", 2) == 0
    assert "12 labels, too few images of each for probes" in capsys.readouterr().out

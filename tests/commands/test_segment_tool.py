"""``tools/segment.py``, driven as a user drives it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mim.cli import main
from mim.commands import make_shapes
from mim.evaluation.segmentation_heads import load_head

ROOT = Path(__file__).parents[2]
TINY = [
    "--steps",
    "3",
    "--batch_size",
    "4",
    "--device",
    "cpu",
    "--num_workers",
    "0",
    "--threads",
    "1",
    "--pictures",
    "2",
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def masks(tmp_path):
    make_shapes.run(tmp_path / "masks", train=10, val=5, size=32)
    return tmp_path / "masks"


def segment(weights, data, *args):
    return main("segment", ["--weights", weights, "--data", str(data), "--devices", "1", *TINY, *map(str, args)])


@pytest.mark.parametrize(
    "options",
    [
        ["--head", "linear"],
        ["--head", "linear", "--taps", "2", "--finetune", "true", "--crop", "40"],
        ["--head", "knn", "--inference", "whole"],
        ["--head", "upernet", "--taps", "[0,1,2,3]", "--flip", "true", "--scales", "[1.0,1.5]"],
    ],
)
def test_every_head_stands_beside_an_untrained_encoder(weights, masks, options, capsys):
    assert segment(weights, masks, "--out", "result", *options) == 0
    result = json.loads(Path("result/metrics.json").read_text())
    metrics = result["metrics"]
    assert len(metrics["mIoU"]) == len(metrics["mIoU, untrained"]) == 1
    assert set(metrics["IoU per class, pretrained"]) >= {"background", "arrow", "triangle"}
    assert options[1] in result["protocol"]
    assert len(list(Path("result").glob("overlay_*.png"))) == 2
    text = capsys.readouterr().out
    assert "5 in val to be scored, 11 classes" in text
    assert "pixel accuracy" in text


def test_positions_are_resized_and_the_protocol_says_so(weights, masks, capsys):
    assert segment(weights, masks, "--out", "result", "--crop", "64") == 0
    assert "pos_embed resized 4x4 -> 8x8" in capsys.readouterr().out


def test_the_section_appears_in_the_report_of_the_run(weights, masks, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("epochs: 1\n")
    assert segment(weights, masks, "--out", run / "evaluation" / "segment") == 0
    page = (run / "report.html").read_text()
    assert "Semantic segmentation, linear head" in page
    assert "overlay_0" in page


@pytest.mark.middle
def test_two_processes_score_like_one(weights, masks):
    """Five images are three and two; the answer is counted once for each."""
    options = ["--batch_norm", "false", "--scale", "[1.0,1.5]"]
    assert segment(weights, masks, "--out", "one", *options) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tools" / "segment.py"), "--weights", weights, "--data", str(masks), *TINY]
    command += ["--devices", "2", "--out", "two", *options]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(Path(name, "metrics.json").read_text())["metrics"] for name in ("one", "two"))
    assert one["images"] == two["images"] == 5
    for name in ("mIoU", "pixel accuracy", "mIoU, untrained"):
        assert one[name] == pytest.approx(two[name], abs=1e-3)  # sums in another order may turn a pixel on a border


@pytest.mark.middle
def test_a_stopped_training_goes_on_to_the_same_weights(weights, masks, stop_after_a_checkpoint):
    long = ["--steps", "20", "--save_every", "1", "--head", "upernet", "--finetune", "true"]
    assert segment(weights, masks, *long, "--out", "whole") == 0
    command = [sys.executable, str(ROOT / "tools" / "segment.py"), "--weights", weights, "--data", str(masks), *TINY]
    command += ["--devices", "1", *long, "--out", "stopped"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipe)
    stop_after_a_checkpoint(process, "stopped")  # the untrained encoder comes first
    assert segment(weights, masks, *long, "--out", "stopped", "--resume", "true") == 0
    for file in ("model.safetensors", "head.safetensors"):
        whole, resumed = (load_file(Path(name, "export", file)) for name in ("whole", "stopped"))
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    whole, resumed = (json.loads(Path(name, "metrics.json").read_text())["metrics"] for name in ("whole", "stopped"))
    assert whole == resumed
    assert Path("stopped/overlay_0.png").exists()
    assert load_head(Path("whole/export/head.safetensors")).taps == [0, 2, 3, 5]  # a quarter of six blocks each
    assert not list(Path("stopped").rglob("*.ckpt"))


def test_resuming_with_other_settings_is_refused(weights, masks, capsys):
    assert segment(weights, masks, "--out", "result") == 0
    assert segment(weights, masks, "--lr", "0.5", "--out", "result", "--resume", "true") == 2
    assert "lr None -> 0.5" in capsys.readouterr().err


def test_a_training_that_breaks_down_says_what_to_try(weights, masks, capsys):
    assert segment(weights, masks, "--lr", "1e9", "--finetune", "true", "--out", "result") == 3
    text = capsys.readouterr().err
    assert "not finite at step" in text
    assert "a lower --lr" in text


def test_a_wrong_value_ends_in_three_lines(weights, masks, capsys):
    assert segment(weights, masks, "--num_classes", "3") == 2
    text = capsys.readouterr().err
    assert text.startswith("error: segment: ")
    assert "but --num_classes 3 allows 0..2" in text
    assert "try:" in text


def test_a_wrong_value_found_while_training_ends_in_three_lines(weights, masks, capsys, monkeypatch):
    monkeypatch.setattr("mim.data.segmentation.CHECKED", 0)
    monkeypatch.setattr("mim.data.segmentation.SegmentationData._refuse_absent", lambda *seen: None)
    for mask in (masks / "train" / "masks").rglob("*.png"):
        Image.fromarray(np.full((32, 32), 77, dtype=np.uint8)).save(mask)
    assert segment(weights, masks, "--num_workers", "1") == 2
    assert "holds value 77" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--ignore", "none"], "--ignore none"),
        (["--taps", "99"], "--taps 99"),
        (["--taps", "[0,0]"], "each is named once"),
        (["--head", "upernet", "--taps", "1"], "reads four blocks"),
        (["--head", "knn", "--finetune", "true"], "k-NN head trains nothing"),
        (["--stride", "0"], "--stride cannot be 0"),
        (["--crop", "33"], "does not divide by the patch size"),
        (["--data", "nowhere"], "no such folder"),
    ],
)
def test_mistakes_end_in_a_message(weights, masks, args, expected, capsys):
    assert segment(weights, masks, *args) == 2
    assert expected in capsys.readouterr().err

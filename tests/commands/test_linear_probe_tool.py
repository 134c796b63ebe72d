"""``tools/linear_probe.py``, driven as a user drives it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from mim.cli import main

ROOT = Path(__file__).parents[2]
SHORT = ["--num_workers", "0", "--seeds", "2", "--epochs", "3", "--warmup_epochs", "1", "--batch_size", "16"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def probe(weights, photos, *args):
    return main("linear_probe", ["--weights", weights, "--data", str(photos), *SHORT, *map(str, args)])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "class token of the last block, 32 px, centre crop 1;"),
        (["--optimizer", "lars", "--pool", "mean"], "batch norm without affine, LARS, 3 epochs of batch 16"),
        (["--layers", 2, "--pool", "both", "--norm", "none", "--select", "on_test"], "CHOSEN ON THE REPORTED IMAGES"),
        (["--head", "attentive"], "all patch tokens of the last block"),
        (["--head", "multi_query", "--queries", 4, "--lrs", "[0.001]"], "learning rate 0.001"),
        (["--crops", 2], "2 random crops of each image in turn"),
    ],
    ids=lambda value: str(value[1] if isinstance(value, list) and value else "default")[:12],
)
def test_accuracies_and_a_confusion_picture_are_written_with_the_protocol(weights, photos, args, words):
    assert probe(weights, photos, *args, "--out", "result") == 0
    result = json.loads(Path("result/metrics.json").read_text())
    assert words in result["protocol"]
    assert len(result["metrics"]["top-1"]) == len(result["metrics"]["top-5, untrained"]) == 2
    with Image.open("result/confusion.png") as picture:
        assert picture.width > 100


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_an_exported_probe_is_a_classifier_of_timm_that_answers_as_reported(weights, photos, pool):
    assert probe(weights, photos, "--pool", pool, "--export", "true", "--seeds", 1, "--out", "result") == 0
    model = timm.create_model("local-dir:result/export", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["arrow", "circle", "cross"]
    right = 0
    for label, name in enumerate(["arrow", "circle", "cross"]):
        for path in (photos / "val" / name).iterdir():
            pixels = pil_to_tensor(Image.open(path).convert("RGB")) / 255
            right += int(model((pixels[None] - 0.5) / 0.25).argmax() == label)
    assert right / 15 == pytest.approx(json.loads(Path("result/metrics.json").read_text())["metrics"]["top-1"][0])


@pytest.mark.parametrize(
    "args", [["--head", "attentive"], ["--layers", 2], ["--pool", "both"], ["--reduction", "tome"]]
)
def test_a_probe_that_no_timm_model_can_hold_is_not_exported(weights, photos, args, capsys):
    assert probe(weights, photos, *args, "--export", "true") == 2
    assert f"error: --export true with {args[0]} {args[1]}" in capsys.readouterr().err


def test_a_repetition_gives_the_same_numbers(weights, photos):
    for name in ("first", "second"):
        assert probe(weights, photos, "--out", name) == 0
    assert Path("first/metrics.json").read_text() == Path("second/metrics.json").read_text()


def test_a_config_sets_options(weights, photos, tmp_path):
    (tmp_path / "probe.yaml").write_text("layers: 2\noptimizer: lars\n")
    assert probe(weights, photos, "--config", tmp_path / "probe.yaml", "--out", "result") == 0
    assert "last 2 blocks" in json.loads(Path("result/metrics.json").read_text())["protocol"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--lrs", "[0.0]"], "--lrs"),
        (["--head", "multi_query", "--queries", 5], "--queries 5: queries must divide the width 64"),
        (["--head", "linaer"], "linear"),
    ],
)
def test_mistakes_end_in_a_message(weights, photos, args, expected, capsys):
    assert probe(weights, photos, *args) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.middle
def test_two_processes_share_the_trainings_and_get_the_numbers_of_one(weights, photos):
    """The features lie in the cache: what remains is equal to the bit."""
    options = ["--head", "multi_query", "--queries", "4"]
    assert probe(weights, photos, *options, "--out", "one") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tools" / "linear_probe.py"), "--weights", weights, "--data", str(photos), *SHORT, *options]
    command += ["--out", "two"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path("one/metrics.json").read_text() == Path("two/metrics.json").read_text()

"""``tools/knn.py``, driven as a user drives it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mim.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def knn(weights, *args):
    return main("knn", ["--weights", weights, "--num_workers", "0", "--k", "[3,5]", "--seeds", "2", *map(str, args)])


def test_accuracies_stand_beside_those_of_untrained_encoders(weights, photos, tmp_path, capsys):
    assert knn(weights, "--data", photos, "--out", "result") == 0
    result = json.loads(Path("result/metrics.json").read_text())
    assert set(result["metrics"]) == {
        f"{k}-NN top-{top}{who}" for k in (3, 5) for top in (1, 5) for who in ("", ", untrained")
    }
    assert len(result["metrics"]["3-NN top-1, untrained"]) == 2
    assert "learnt from 36 images, scored on 15" in result["protocol"]
    assert "3-NN top-1" in capsys.readouterr().out


def test_features_are_read_from_the_cache_the_second_time(weights, photos, monkeypatch):
    assert knn(weights, "--data", photos, "--out", "first") == 0
    monkeypatch.setattr("mim.evaluation.features.Features.of", None)
    assert knn(weights, "--data", photos, "--out", "second") == 0
    assert Path("first/metrics.json").read_text() == Path("second/metrics.json").read_text()


def test_without_a_test_part_a_share_is_held_out(weights, photos):
    assert knn(weights, "--data", photos / "train", "--val_fraction", 0.25, "--out", "result") == 0
    assert "learnt from 27 images, scored on 9" in json.loads(Path("result/metrics.json").read_text())["protocol"]


@pytest.mark.middle
def test_two_processes_give_the_result_of_one(weights, photos):
    """15 images to score are 8 and 7: nothing is counted twice to make the parts equal."""
    assert knn(weights, "--data", photos, "--out", "one") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tools" / "knn.py"), "--weights", weights, "--data", str(photos), "--num_workers", "0"]
    command += ["--k", "[3,5]", "--seeds", "2", "--out", "two", "--cache", "elsewhere"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(Path(name, "metrics.json").read_text())["metrics"] for name in ("one", "two"))
    assert one == two
    for bank in Path("elsewhere").iterdir():  # to rounding: other rows stood beside each in its batch
        same = Path("runs/features") / bank.name / "features.npy"
        np.testing.assert_allclose(np.load(bank / "features.npy"), np.load(same), atol=1e-5)


def test_classes_that_differ_are_refused_and_the_shared_ones_can_be_scored(weights, photos, capsys):
    (photos / "val" / "cross").rename(photos / "val" / "fox")
    assert knn(weights, "--data", photos) == 2
    text = capsys.readouterr().err
    assert "train/ has 3 classes, val/ has 3  (missing in val: cross; missing in train: fox)" in text
    assert "try:   --classes common   scores the 2 shared ones" in text
    assert knn(weights, "--data", photos, "--classes", "common", "--out", "result") == 0
    assert "learnt from 24 images, scored on 10" in json.loads(Path("result/metrics.json").read_text())["protocol"]


def test_images_without_labels_are_refused(weights, photos, capsys):
    assert knn(weights, "--data", photos / "train" / "arrow") == 2
    assert "has no labels" in capsys.readouterr().err


def test_an_unreadable_image_is_named_and_left_out(weights, photos, capsys):
    (photos / "val" / "arrow" / "broken.png").write_bytes(b"nonsense")
    assert knn(weights, "--data", photos) == 2  # 1 of 16 is more than 1 %
    for out in ("computed", "cached"):
        capsys.readouterr()
        assert knn(weights, "--data", photos, "--max_bad", 0.1, "--out", out) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "broken.png" in line)
        assert line.startswith("warning: ")
        assert line.endswith("- skipped")


def test_unreadable_images_are_judged_when_features_come_from_the_cache_too(weights, photos):
    (photos / "val" / "arrow" / "broken.png").write_bytes(b"nonsense")
    assert knn(weights, "--data", photos, "--max_bad", 0.1, "--out", "result") == 0
    assert knn(weights, "--data", photos, "--out", "strict") == 2


def test_an_image_that_changes_is_looked_at_again(weights, photos):
    assert knn(weights, "--data", photos, "--out", "result") == 0
    banks = len(list(Path("runs/features").iterdir()))
    image = next((photos / "val" / "arrow").iterdir())
    Image.new("RGB", (40, 40)).save(image)
    assert knn(weights, "--data", photos, "--out", "result") == 0
    assert len(list(Path("runs/features").iterdir())) == banks + 3  # the scored part, of three encoders


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--k", "[0]"], "--k cannot be 0"),
        (["--layers", "99"], "99 layers cannot be read"),
        (["--crop_pct", "2"], "--crop_pct cannot be 2"),
        (["--device", "cuda"], "--device cuda"),
        (["--val_fraction", "1.5", "--data", "photos/train"], "--val_fraction cannot be 1.5"),
    ],
)
def test_mistakes_end_in_a_message(weights, photos, args, expected, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert knn(weights, "--data", photos, *args) == 2
    assert expected in capsys.readouterr().err

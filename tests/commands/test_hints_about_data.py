"""What a refusal of data proposes is typed as it stands, and works."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mim.cli import main

pytestmark = pytest.mark.usefixtures("quick_probes")

TINY = str(Path(__file__).parents[1] / "tiny.yaml")
SEGMENT = ["--steps", "1", "--batch_size", "2", "--device", "cpu", "--devices", "1", "--pictures", "0"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def draw(*paths):
    for number, path in enumerate(paths):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def table(heading, *rows):
    draw(*(f"{name}.png" for name in "abcdef"))
    cells = [f"{name}.png,{row}" for name, row in zip("abcdef", rows, strict=True)]
    Path("list.csv").write_text("\n".join([heading, *cells]) + "\n")
    return "list.csv"


def masks(values):
    for part in ("train", "val"):
        for number in range(2):
            draw(f"d/{part}/images/{number}.png")
            path = Path(f"d/{part}/masks/{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.kron(np.array([values], np.uint8), np.ones((32, 32 // len(values)), np.uint8))).resize(
                (32, 32), Image.Resampling.NEAREST
            ).save(path)
    return "d"


def first_try(text):
    """The options of the first alternative of the line ``try:``."""
    hint = next(line for line in text.splitlines() if line.startswith("try:"))
    return shlex.split(hint.removeprefix("try:").strip().split("   ")[0].split("  to ")[0])


def domains():
    draw(*(f"d/{a}/{b}/{n}.png" for a in ("art", "photo") for b in ("cat", "dog") for n in range(2)))
    return "d"


def parts_alone():
    draw(*(f"d/{part}/{n}.png" for part in ("train1", "train2") for n in range(3)))
    return "d"


def unequal_parts():
    draw(*(f"d/{part}/{name}/{n}.png" for part in ("Train", "Val") for name in ("a", "b") for n in range(2)))
    draw("d/Train/c/1.png", "d/Train/c/2.png")
    return "d"


KNN = {
    "domains": (domains, ["--classes", "same"]),
    "parts": (parts_alone, []),
    "level": (domains, ["--label_column", "3"]),
    "several columns": (lambda: table("path,sex,ill", "m,1", "m,1", "f,0", "f,1", "m,0", "f,0"), []),
    "several labels": (lambda: table("path,rain,fog", "1,1", "0,1", "0,0", "1,0", "0,0", "1,1"), []),
    "combined labels": (lambda: table("path,label", "a|b", "a", "a|b", "a", "b", "b"), []),
    "gaps": (lambda: table("path,label", "a", "", "a", "b", "b", ""), []),
    "column": (lambda: table("path,sex,ill", "m,1", "m,1", "f,0", "f,1", "m,0", "f,0"), ["--label_column", "age"]),
}


@pytest.mark.parametrize(("make", "options"), KNN.values(), ids=KNN)
def test_what_knn_proposes_works(weights, make, options, capsys):
    args = ["--weights", weights, "--data", make(), "--k", "[1]", "--seeds", "0", "--num_workers", "0", *options]
    assert main("knn", [*args, "--out", "first"]) == 2
    tried = first_try(capsys.readouterr().err)
    assert tried[0].startswith("--label_column")
    assert main("knn", [*args, "--out", "second", *tried]) == 0


def test_parts_of_other_classes_are_refused_with_two_ways_on(weights, capsys):
    data = unequal_parts()
    args = ["--weights", weights, "--data", data, "--k", "[1]", "--seeds", "0", "--num_workers", "0"]
    assert main("knn", args) == 2
    assert "--classes common" in capsys.readouterr().err
    assert main("knn", [*args, "--classes", "common", "--out", "second"]) == 0
    pretrain = ["--config", TINY, "--epochs", "1", "--data"]
    assert main("pretrain", [*pretrain, data]) == 2
    assert "--data d/Train" in capsys.readouterr().err
    assert main("pretrain", [*pretrain, "d/Train", "--out", "run"]) == 0


@pytest.mark.parametrize("values", [(0, 255), (0, 1, 3), (0, 200)])
def test_what_segment_proposes_works(weights, values, capsys):
    args = ["--weights", weights, "--data", masks(values), *SEGMENT]
    assert main("segment", [*args, "--out", "first"]) == 2
    tried = first_try(capsys.readouterr().err)
    assert tried[tried.index("--mask_values") + 1] == ",".join(map(str, values))
    assert main("segment", [*args, "--out", "second", *tried]) == 0
    scored = json.loads(Path("second/metrics.json").read_text())["metrics"]["IoU per class, pretrained"]
    assert len(scored) == len(values)


def test_a_small_set_says_how_few_steps_it_makes_and_what_to_do(capsys):
    draw(*(f"d/{number}.png" for number in range(12)))
    args = ["--config", TINY, "--data", "d", "--epochs", "2"]
    assert main("pretrain", [*args, "--out", "first"]) == 0
    text = capsys.readouterr().out
    assert "12 images at batch 16: 2 steps in all; --batch_size 4   makes 6 of them" in text
    assert "2 steps in 2 epochs" in text
    assert "2.67" not in text
    strips = {path.name for path in Path("first/images").glob("epoch_*")}
    assert strips <= {"epoch_000.png", "epoch_001.png", "epoch_002.png"}
    assert main("pretrain", [*args, "--out", "second", "--batch_size", "4"]) == 0
    assert "images at batch" not in capsys.readouterr().out
    assert json.loads(Path("second/summary.json").read_text())["steps"] == 6


def test_uneven_classes_get_a_balanced_accuracy_and_their_counts(weights, capsys):
    for part in ("train", "val"):
        draw(*(f"d/{part}/many/{n}.png" for n in range(8)), *(f"d/{part}/few/{n}.png" for n in range(2)))
    args = ["--weights", weights, "--data", "d", "--num_workers", "0"]
    assert main("knn", [*args, "--k", "[1]", "--seeds", "1", "--out", "knn"]) == 0
    probe = [*args, "--epochs", "2", "--seeds", "1", "--lrs", "[0.1]"]
    assert main("linear_probe", [*probe, "--out", "linear"]) == 0
    assert main("linear_probe", [*probe, "--head", "attentive", "--out", "attentive"]) == 0
    assert main("finetune", [*args, "--epochs", "1", "--seeds", "1", "--device", "cpu", "--out", "finetune"]) == 0
    assert capsys.readouterr().out.count("balanced accuracy") == 4
    scored = {"few": 2, "many": 8}
    for folder, kind in (("knn", "1-NN "), ("linear", ""), ("attentive", ""), ("finetune", "")):
        metrics = json.loads(Path(folder, "metrics.json").read_text())["metrics"]
        assert len(metrics[f"{kind}balanced accuracy"]) == len(metrics[f"{kind}balanced accuracy, untrained"]) == 1
        assert metrics["images learnt per class"] == metrics["images scored per class"] == scored
        right = metrics[f"images right per class, {kind.strip() or 'seed 0'}"]
        assert sum(right.values()) / 10 == pytest.approx(metrics[f"{kind}top-1"][0])
        shares = [right[name] / scored[name] for name in scored]
        assert sum(shares) / 2 == pytest.approx(metrics[f"{kind}balanced accuracy"][0])


def test_even_classes_need_no_balanced_accuracy(weights, capsys):
    draw(*(f"d/{part}/{name}/{n}.png" for part in ("train", "val") for name in "ab" for n in range(2)))
    args = ["--weights", weights, "--data", "d", "--num_workers", "0", "--k", "[1]", "--seeds", "0", "--out", "knn"]
    assert main("knn", args) == 0
    assert "balanced" not in capsys.readouterr().out + Path("knn/metrics.json").read_text()

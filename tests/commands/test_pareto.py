"""Accuracy over speed: ``tools/pareto.py`` and ``tools/pareto_finetuned.py``."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mim.cli import main
from mim.commands import make_shapes


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pareto(weights, photos, *args):
    options = ["--weights", weights, "--data", str(photos), "--out", "page", "--rounds", "1", "--batch_size", "2"]
    return main("pareto", [*options, "--device", "cpu", "--num_workers", "0", *args])


def test_every_rate_is_a_point_beside_the_whole_model(weights, photos, tmp_path, capsys):
    make_shapes.run(tmp_path / "masks", train=10, val=5, size=32)
    options = ["--reduction", "tome,random", "--shares", "0.8,0.6", "--masks", str(tmp_path / "masks")]
    assert pareto(weights, photos, *options) == 0
    result = json.loads(Path("page/metrics.json").read_text())
    names = [name.split()[0] for name in result["metrics"]]
    assert names == ["none", "tome", "tome", "random", "random"]
    assert all(0 <= facts[what] <= 1 for facts in result["metrics"].values() for what in ("20-NN top-1", "mIoU"))
    assert result["metrics"]["none"]["speedup"] == result["metrics"]["none"]["share"] == 1
    assert "20-NN: class token of the last block" in result["protocol"]  # as the weights pool
    assert result["pool"] == "cls"
    page = Path("page/pareto.html").read_text()
    assert page.count("<tr>") == 6
    assert "data:image/webp" in page
    assert 'src="http' not in page
    assert Path("page/pareto.md").read_text().count("\n") == 7
    assert Image.open("page/pareto.png").width == 1300
    assert "speed, wall" in capsys.readouterr().out
    common = ["--weights", weights, "--data", str(photos), "--num_workers", "0", "--seeds", "0"]
    assert main("knn", [*common, "--k", "[20]", "--out", "knn"]) == 0
    neighbours = json.loads(Path("knn/metrics.json").read_text())["metrics"]["20-NN top-1"]
    assert neighbours == [result["metrics"]["none"]["20-NN top-1"]]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--reduction", "tome,cropr"], "--reduction cropr: its scores are random until they are trained"),
        (["--reduction", "tone"], "--reduction tome"),
        (["--shares", "half"], "--shares half: these are not numbers"),
    ],
)
def test_mistakes_end_in_lines_that_help(weights, photos, args, line, capsys):
    assert pareto(weights, photos, *args) == 2
    assert line in capsys.readouterr().err


def finetuned(weights, photos, out, *args):
    short = ["--num_workers", "0", "--epochs", "1", "--batch_size", "12", "--device", "cpu", "--from_scratch", "false"]
    return main("finetune", ["--weights", weights, "--data", str(photos), *short, "--out", f"tuned/{out}", *args])


def test_fine_tunings_are_points_of_one_page(weights, photos, tmp_path, capsys):
    """Classification and segmentation each beside a fine-tuning without reduction, with what each has learnt."""
    assert finetuned(weights, photos, "whole") == 0
    assert finetuned(weights, photos, "cropr", "--reduction", "cropr:2") == 0
    make_shapes.run(tmp_path / "masks", train=10, val=5, size=32)
    segment = ["--weights", weights, "--data", "masks", "--steps", "2", "--batch_size", "4", "--finetune", "true"]
    segment += ["--device", "cpu", "--num_workers", "0", "--devices", "1", "--pictures", "0"]
    assert main("segment", [*segment, "--out", "tuned/segment"]) == 0
    assert main("segment", [*segment, "--out", "tuned/dtop", "--reduction", "dtop:0.6"]) == 0
    page = ["--finetuned", "tuned", "--out", "page", "--rounds", "1", "--batch_size", "2", "--device", "cpu"]
    assert main("pareto_finetuned", page) == 0
    metrics = json.loads(Path("page/metrics.json").read_text())["metrics"]
    names = ["none, top-1", "cropr PerBlock(r=2, inflect=0.0, stop=2), top-1"]
    names += ["none, mIoU", "dtop KeepRate(keep=0.6, at=(1, 3)), mIoU"]
    assert list(metrics) == names
    for name, folder, what in zip(
        names, ("whole", "cropr", "segment", "dtop"), ("top-1", "top-1", "mIoU", "mIoU"), strict=True
    ):
        (score,) = json.loads(Path("tuned", folder, "metrics.json").read_text())["metrics"][what]
        assert metrics[name][what] == score
    assert [facts["share"] < 1 for facts in metrics.values()] == [False, True, False, True]
    assert Image.open("page/pareto.png").width == 1300
    assert "top-1: all weights trained" in capsys.readouterr().out


def test_only_like_is_compared_with_like(weights, photos, capsys):
    page = ["--finetuned", "tuned", "--out", "page", "--rounds", "1", "--batch_size", "2", "--device", "cpu"]
    assert main("pareto_finetuned", page) == 2
    assert "no fine-tuning lies there" in capsys.readouterr().err
    assert finetuned(weights, photos, "tome", "--reduction", "tome:1") == 0
    assert main("pareto_finetuned", page) == 2
    assert "top-1 is there with reductions only" in capsys.readouterr().err
    assert finetuned(weights, photos, "whole", "--epochs", "2") == 0
    assert main("pareto_finetuned", page) == 2
    assert "epochs is 2.0 in one, 1.0 in the other" in capsys.readouterr().err

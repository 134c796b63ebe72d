import json

import pytest
import timm
import torch

from mim.benchmark.inference import contenders, measure, patch_drop
from mim.cli import main

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 5}


@pytest.fixture
def vit():
    return timm.create_model("vit_tiny_patch16_224", **TINY).eval()


def test_every_contender_is_held_against_the_whole_model(vit):
    rows = measure(contenders(vit, ["evit", "tome"], [0.6], torch.randn(2, 3, 32, 32), "32-true"), rounds=1)
    assert [row["name"] for row in rows] == ["none", "timm patch drop", "evit", "tome"]
    assert rows[0]["speedup"] == rows[0]["share"] == 1
    for row in rows:
        assert row["gmac_counted"] == pytest.approx(row["gmac"], rel=1e-2)
        assert row["memory_bytes"] > 0
        assert row["images_per_second"] > 0


def test_patch_drop_drops_in_evaluation_and_leaves_the_model_alone(vit):
    images = torch.randn(2, 3, 32, 32)
    expected = vit(images)
    dropped = patch_drop(vit, 0.5, images, "32-true")
    assert dropped.setting == "7 of 16"
    assert dropped.model.forward_features(images).shape[1] == 1 + 7
    assert torch.equal(vit(images), expected)


def test_the_command_prints_a_row_each_and_writes_them(tmp_path, capsys):
    out = tmp_path / "numbers.json"
    options = ["--reduction=topk,expedite", "--shares=0.6", "--model=test_vit", "--batch_size=1", "--rounds=1"]
    assert main("benchmark_reduction", [*options, f"--json={out}", "--threads=1"]) == 0
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == [
        "none",
        "timm patch drop",
        "topk",
        "expedite",
    ]
    assert "of MACs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--reduction=tom"], "--reduction tom: there is no such reduction"),
        (["--reduction=tome", "--shares=half"], "--shares half: these are not numbers"),
    ],
)
def test_mistakes_end_in_lines_that_help(options, line, capsys):
    assert main("benchmark_reduction", options) == 2
    assert line in capsys.readouterr().err

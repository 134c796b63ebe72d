"""``tools/visualize.py``, driven as a user drives it."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from mim.cli import main
from mim.commands.visualize import _EXPLANATIONS
from mim.evaluation.explanations import EXPLANATIONS
from mim.interop import ModelCard, export_backbone
from mim.pictures.strips import read_strip
from mim.pictures.tokens import EDGE, draw_tokens, spread_over
from mim.reduction import LearnedThresholds
from mim.reduction.files import save_reduction


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def visualize(weights, *args):
    return main("visualize", ["--weights", weights, "--data", "shapes", "--images", "2", *map(str, args)])


def test_blocks_that_reduce_stand_side_by_side(weights, capsys):
    assert visualize(weights, "--reduction", "tome:2", "--columns", 3, "--out", "new/tome.png") == 0
    tiles = read_strip(Path("new/tome.png"))
    assert list(tiles) == ["input", "block 1: 12 of 16", "block 3: 8 of 16", "block 5: 4 of 16"]
    assert [len(column) for column in tiles.values()] == [2] * 4
    assert "ToMe(schedule=PerBlock(r=2" in capsys.readouterr().out


def test_several_reductions_stand_side_by_side(weights):
    assert visualize(weights, "--reduction", "random:0.5,expedite:0.5") == 0
    assert list(read_strip(Path("visualize.png"))) == [
        "input",
        "random:0.5, block 4: 2 of 16",
        "expedite:0.5, block 1: 9 of 16",
    ]


def test_hidden_tokens_leave_the_picture(weights, tmp_path):
    """Thresholds that nothing reaches: one patch is left of each image."""
    reduction = LearnedThresholds(depth=6)
    torch.nn.init.constant_(reduction.thresholds, 2.0)
    save_reduction(reduction, tmp_path)
    assert visualize(weights, "--reduction", tmp_path, "--columns", 1, "--images", 1) == 0
    tiles = read_strip(Path("visualize.png"))
    assert list(tiles) == ["input", "block 5: 1 of 16"]
    (tile,) = tiles["block 5: 1 of 16"]
    faded = (np.asarray(tile).min(axis=2) >= round(0.85 * 255)).mean()
    assert faded >= 15 / 16


def test_a_reduction_may_be_a_file(weights, photos):
    Path("mine.yaml").write_text(
        "reduction:\n  class_path: mim.reduction.TopKPruning\n  init_args:\n"
        "    schedule: {class_path: mim.reduction.Counts, init_args: {counts: [16, 16, 5, 5, 5, 5]}}\n"
        "    score: {class_path: mim.reduction.ReceivedAttention}\n"
    )
    assert visualize(weights, "--reduction", "mine.yaml", "--data", photos) == 0
    assert list(read_strip(Path("visualize.png"))) == ["input", "block 2: 5 of 16"]


def test_policies_stand_side_by_side(weights):
    assert visualize(weights, "--policy", "all") == 0
    assert list(read_strip(Path("visualize.png"))) == [
        *("input", "attention"),
        *("random", "block", "inverse", "high", "hint", "low"),
    ]


def test_a_model_without_weights_is_drawn_untrained(capsys):
    assert main("visualize", ["--model", "test_vit", "--img_size", "32", "--images", "1"]) == 0
    assert list(read_strip(Path("visualize.png"))) == ["input", "attention", "features"]
    assert "untrained" in capsys.readouterr().out


def test_patches_are_kept_averaged_or_faded():
    pixels = torch.zeros(1, 3, 96, 128, dtype=torch.uint8)
    pixels[..., 32:64], pixels[..., 64:96], pixels[..., 96:] = 40, 80, 100
    drawn = draw_tokens(pixels, torch.tensor([[0, 1, 1, -1]]), (96, 32))
    assert drawn.shape == pixels.shape
    assert drawn[0, 0, 48, [16, 48, 80, 112]].tolist() == [0, 60, 60, round(0.85 * 255 + 0.15 * 100)]
    rim = (drawn == torch.tensor(EDGE)[:, None, None]).all(1)[0]
    assert rim.sum() == 2 * 64 + 2 * 96 - 4  # one outline around both merged patches, none between them
    assert rim[0, 32:96].all()


def test_columns_are_spread_and_end_with_the_last():
    assert spread_over(range(12), 5) == [1, 3, 6, 8, 11]
    assert spread_over([3, 6, 9], 5) == [3, 6, 9]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--reduction", "tom"], "--reduction tom: there is no such reduction"),
        (["--reduction", "tome:half"], "--reduction tome:half"),
        (["--reduction", "tome:2.5"], "2.5 is not a whole number"),
        (["--reduction", "evit:2"], "keep 2.0 is outside (0, 1]"),
        (["--reduction", "cropr"], "random until they are trained"),
        (["--reduction", "nowhere.yaml"], "--reduction nowhere.yaml"),
        (["--policy", "hard"], "--policy hard: there is no such policy"),
        (["--policy", "all", "--reduction", "tome"], "two pictures"),
        (["--images", "0"], "--images cannot be 0"),
        (["--out", "/proc/no.png"], "--out /proc/no.png cannot be written"),
    ],
)
def test_mistakes_end_in_lines_that_help(weights, args, line, capsys):
    assert visualize(weights, *args) == 2
    assert line in capsys.readouterr().err


def test_without_class_token_no_policy_follows_attention(capsys):
    model = ["--model", "test_vit2", "--img_size", "32", "--images", "1"]
    assert main("visualize", ["--policy", "all", *model]) == 0
    assert list(read_strip(Path("visualize.png"))) == ["input", "random", "block", "inverse"]
    assert main("visualize", ["--policy", "high", *model]) == 2
    assert "no class token whose attention" in capsys.readouterr().err


def test_some_model_must_be_named(capsys):
    assert main("visualize", []) == 2
    assert "there is no model to look into" in capsys.readouterr().err


@pytest.fixture(scope="module")
def classifier(weights, tmp_path_factory):
    """A timm folder of an encoder with a classifier of three classes."""
    vit = timm.create_model(f"local-dir:{weights}", pretrained=True)
    vit.reset_classifier(3)
    card, scale = ModelCard("fine-tuning", "shapes"), {"mean": [0.5] * 3, "std": [0.25] * 3}
    folder = tmp_path_factory.mktemp("classifier") / "export"
    export_backbone(vit, folder, card=card, class_names=["arrow", "circle", "cross"], **scale)
    return str(folder)


def test_explanations_stand_beside_the_images_and_their_deletion_test_is_printed(classifier, capsys):
    assert visualize(classifier, "--explain", "all", "--deleted", 3, "--out", "explained.png") == 0
    tiles = read_strip(Path("explained.png"))
    assert list(tiles) == ["input", "rollout", "tokentm", "gradcam"]
    assert [len(column) for column in tiles.values()] == [2] * 4
    text = capsys.readouterr().out
    assert "% of 3 images that keep their answer" in text
    rows = [line.split() for line in text.splitlines() if "important first" in line]
    assert [row[0] for row in rows] == [name for name in ("rollout", "tokentm", "gradcam", "chance") for _ in "12"]
    assert all(0 <= float(row[-1]) <= 1 for row in rows)
    assert all(len(row) == 4 + 9 + 1 for row in rows)
    assert text.count("  image ") == 2


def test_the_explanations_that_the_command_names_are_those_that_there_are():
    assert tuple(EXPLANATIONS) == _EXPLANATIONS


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--explain", "lime"], "try:   --explain rollout,tokentm,gradcam"),
        (["--explain", "rollout"], "has no classifier whose answers could be explained"),
        (["--explain", "rollout", "--policy", "all"], "error: --policy and --explain are two pictures"),
    ],
)
def test_what_cannot_be_explained_is_refused(weights, args, expected, capsys):
    assert visualize(weights, *args) == 2
    assert expected in capsys.readouterr().err

"""Parts that live in somebody else's package: used after ``--plugin``, refused without, in every command."""

import shutil
import sys

import pytest
import torch
import yaml
from strikes import ROOT, checkpoints, differences

from mim.cli import COMMANDS, WITHOUT_RUNS, function_parser, main

PACKAGE = '''
"""Parts of somebody else."""

import torch

from mim.data.views import SingleView
from mim.masking import HardPatchMasking
from mim.methods import HPM
from mim.targets import PixelTarget

torch.mim_plugin_ran = True


class TheirMethod(HPM):
    """Their method."""


class TheirMasking(HardPatchMasking):
    """Their policy."""


class TheirTarget(PixelTarget):
    """Their target."""

    def error(self, prediction, target):
        return (prediction - target).abs().mean(-1)


class TheirViews(SingleView):
    """Their views."""
'''

PARTS = {
    "method": ("class_path: HPM", "class_path: their_parts.TheirMethod"),
    "masking policy": ("class_path: HardPatchMasking", "class_path: their_parts.TheirMasking"),
    "target": ("class_path: PixelTarget", "class_path: their_parts.TheirTarget"),
    "views": ("path: shapes,", "path: shapes, views: {class_path: their_parts.TheirViews},"),
}


def recipe(folder, *parts):
    """A config file with their parts in the place of ours."""
    text = (ROOT / "tests" / "tiny_hpm.yaml").read_text()
    for part in parts:
        assert PARTS[part][0] in text
        text = text.replace(*PARTS[part], 1)
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with all of their parts; their package lies beside it."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    (home / "their_parts.py").write_text(PACKAGE)
    args = ["--config", str(recipe(home, *PARTS)), "--out", str(home / "run"), "--epochs", "0.1", "--pictures", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main("pretrain", [*args, "--plugin", "their_parts", "--probe_images", "10"]) == 0
    return home / "run"


@pytest.fixture(autouse=True)
def _forgotten(run, monkeypatch):
    """The package is at hand, and as if nobody had imported it."""
    monkeypatch.chdir(run.parent)
    sys.modules.pop("their_parts", None)
    torch.__dict__.pop("mim_plugin_ran", None)


@pytest.mark.parametrize("part", PARTS)
def test_without_the_plugin_each_part_is_refused_in_three_lines_that_name_it(part, tmp_path, capsys):
    assert main("pretrain", ["--config", str(recipe(tmp_path, part)), "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:7] for line in lines] == ["error: ", "why:   ", "try:   "]
    assert PARTS[part][1].rpartition("class_path: ")[2].strip("},") in lines[0]
    assert lines[2] == "try:   --plugin their_parts   (it imports the package, which runs its code)"
    assert not hasattr(torch, "mim_plugin_ran")


def test_the_run_records_the_plugin_and_the_parts(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["plugin"] == ["their_parts"]
    assert config["model"]["class_path"] == "their_parts.TheirMethod"
    assert config["data"]["views"]["class_path"] == "their_parts.TheirViews"
    assert (run / "command.txt").read_text().endswith("--plugin=their_parts\n")


def test_a_run_of_our_own_parts_records_none(tmp_path):
    args = ["--config", str(recipe(tmp_path)), "--out", str(tmp_path / "run"), "--epochs", "0.02"]
    assert main("pretrain", [*args, "--probe_images", "10", "--pictures", "1"]) == 0
    assert "plugin" not in (tmp_path / "run" / "config.yaml").read_text()


def test_such_a_run_resumes_bit_exactly_when_the_plugin_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    newest = checkpoints(tmp_path / "run")[-1]
    newest.unlink()
    assert main("pretrain", ["--resume", str(tmp_path / "run"), "--plugin", "their_parts"]) == 0
    assert differences(run, tmp_path / "run") == []


def test_the_recorded_config_repeats_the_run(run, tmp_path):
    args = ["--config", str(run / "config.yaml"), "--out", str(tmp_path / "again"), "--plugin=their_parts"]
    assert main("pretrain", args) == 0
    assert differences(run, tmp_path / "again") == []


OPENING = {
    "pretrain": ["--resume"],
    "export": ["--out", "exported", "--run"],
    "visualize": ["--out", "seen.png", "--images", "1", "--data", "shapes", "--weights"],
    "compare": ["--out", "compared", "--images", "1", "--runs"],
    "features": ["--out", "features", "--data", "few", "--num_workers", "0", "--weights"],
    "knn": ["--data", "few", "--k", "[1]", "--seeds", "1", "--num_workers", "0", "--cache", "cache", "--weights"],
    "linear_probe": ["--data", "few", "--epochs", "1", "--seeds", "1", "--num_workers", "0", "--weights"],
    "finetune": ["--data", "few", "--weights"],
    "segment": ["--data", "shapes", "--head", "knn", "--bank", "10", "--weights"],
}


@pytest.fixture
def unfinished(run, tmp_path, photos, monkeypatch):
    """The run without an export, in a folder with a few images."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "run", symlinks=True, ignore=shutil.ignore_patterns("export"))
    shutil.copy(run.parent / "their_parts.py", tmp_path)
    photos.rename(tmp_path / "few")
    return "run"


@pytest.mark.parametrize("command", OPENING)
def test_every_command_that_opens_such_a_run_refuses_it_by_name(command, unfinished, capsys):
    assert main(command, [*OPENING[command], unfinished]) == 2
    error, _, hint = capsys.readouterr().err.splitlines()
    assert "their_parts" in error
    assert hint.startswith("try:   --plugin their_parts ")
    assert not hasattr(torch, "mim_plugin_ran")


@pytest.mark.parametrize("command", ["export", "visualize", "compare", "features", "knn"])
def test_every_command_that_opens_such_a_run_does_so_with_the_plugin(command, unfinished, capsys):
    assert main(command, [*OPENING[command], unfinished, "--plugin", "their_parts"]) == 0, capsys.readouterr().err
    assert "plugin  their_parts imported, its code runs: their_parts.py" in capsys.readouterr().out


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "pretrain"])
def test_the_help_tells_of_plugins_where_a_run_is_opened(command):
    module = __import__(f"mim.commands.{command}", fromlist=["run"])
    text = function_parser(module.run, command).format_help()
    assert ("--plugin" in text) == (command not in WITHOUT_RUNS)


def test_a_reduction_from_a_plugin_is_refused_without_it_too(unfinished, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("reduction: {class_path: their_parts.TheirReduction}")
    assert main("visualize", ["--model", "test_vit", "--reduction", "mine.yaml", "--data", "shapes"]) == 2
    assert "--plugin their_parts" in capsys.readouterr().err.splitlines()[-1]

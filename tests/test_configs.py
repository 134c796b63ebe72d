"""Every recipe that is shipped parses, and describes a model that can be built."""

import importlib
import json
import re
from functools import cache

import pytest
import torch

from mim.cli import COMMANDS, function_parser
from mim.conv_encoder import ConvEncoder, is_conv_net
from mim.encoder import Encoder
from mim.methods import Method
from mim.options.recipes import CONFIGS as ROOT
from mim.run.config import parse

EVALUATIONS = sorted((ROOT / "evaluation").glob("*.yaml"))
CONFIGS = sorted(set(ROOT.rglob("*.yaml")) - set(EVALUATIONS))


@pytest.fixture(params=CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def path(request):
    return request.param


@cache
def parsed(path):
    return parse([f"--config={path}"])


@cache
def sides_patches_and_counts(settings):
    """Of the encoder that these settings describe: many recipes share one."""
    with torch.device("meta"):  # no memory for big models
        described = json.loads(settings)
        encoder = (ConvEncoder if is_conv_net(described["model"]) else Encoder)(**described)
    return list(zip(encoder.img_size, encoder.patch_size, encoder.grid, strict=True))


def test_there_are_recipes():
    assert CONFIGS


def test_a_recipe_names_one_of_our_methods(path):
    module, _, name = parsed(path).model.class_path.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), name), Method)


def test_the_images_of_a_recipe_divide_into_patches(path, monkeypatch):
    settings = json.dumps(vars(parsed(path).model.init_args.encoder), default=vars, sort_keys=True)
    generator = torch.Generator()  # which timm's moving average makes on the device of its weights
    monkeypatch.setattr("torch.Generator", lambda device: generator)
    for side, patch, count in sides_patches_and_counts(settings):
        assert side == patch * count


def test_the_first_line_of_a_recipe_says_what_it_is(path):
    assert path.read_text().startswith("# ")


def test_a_recipe_shows_the_command_that_runs_it(path):
    assert "python -m mim pretrain" in path.read_text()


@pytest.mark.parametrize(
    "folder",
    [path for path in ROOT.iterdir() if path.is_dir() and path != EVALUATIONS[0].parent],
    ids=lambda path: path.name,
)
def test_every_method_has_a_default_and_a_demo(folder):
    assert (folder / "default.yaml").is_file()
    assert (folder / "demo.yaml").is_file()


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.name)
def test_an_evaluation_recipe_sets_options_of_the_command_that_it_shows(path):
    text = path.read_text()
    assert text.startswith("# ")
    command = re.search(r"-m mim (\w+)", text)[1]
    assert command in COMMANDS
    assert f"--config evaluation/{path.stem}" in text
    run = importlib.import_module(f"mim.commands.{command}").run
    function_parser(run, command).parse_args(["--config", str(path), "--weights", "test_vit"])


@pytest.mark.parametrize("name", ["default", "demo", "vit_small_patch16_224", "vit_base_patch16_224"])
def test_attmask_with_the_masks_of_ibot_is_ibot(name):
    ibot, attmask = (parse([f"--config={ROOT / method / name}.yaml"]) for method in ("ibot", "attmask"))
    attmask.model.init_args.masking = ibot.model.init_args.masking
    assert attmask.model == ibot.model

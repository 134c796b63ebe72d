"""Settings that had another name keep their meaning, in files and on the command line."""

from pathlib import Path

import pytest
import yaml

from mim.masking import AttentionMasking, BlockMasking
from mim.methods import MAE, MomentumMAE
from mim.options.old_names import current_arguments, current_yaml
from mim.run.config import instantiate, parse

TESTS = Path(__file__).parents[1]


def saved(tmp_path, recipe, **settings):
    """A recipe with other settings of its method, as a run of an earlier version has written it down."""
    tree = yaml.safe_load((TESTS / recipe).read_text())
    tree["model"]["init_args"] |= settings
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return f"--config={tmp_path / 'config.yaml'}"


@pytest.mark.parametrize("policy", [AttentionMasking, BlockMasking])
def test_a_saved_masking_with_whole_leaves_that_share_unmasked(policy, tmp_path):
    old = {"class_path": f"mim.masking.{policy.__name__}", "init_args": {"whole": 0.125}}
    built = instantiate(parse([saved(tmp_path, "tiny-ibot.yaml", masking=old)])).model.masking
    assert isinstance(built, policy)
    assert built.unmasked_share == 0.125


@pytest.mark.parametrize("option", ["model.init_args.masking.init_args.whole", "model.masking.whole"])
def test_whole_is_still_an_option_of_the_command_line(option):
    config = parse([f"--config={TESTS / 'tiny-ibot.yaml'}", f"--{option}=0.25"])
    assert config.model.init_args.masking.init_args.unmasked_share == 0.25


@pytest.mark.parametrize("standardise", [True, False])
def test_a_saved_mae_predicts_pixels_standardised_or_not_as_it_did(standardise, tmp_path):
    method = instantiate(parse([saved(tmp_path, "tiny.yaml", standardise=standardise)])).model
    assert isinstance(method, MAE)
    assert method.target.standardise is standardise


def test_a_saved_mae_with_a_teacher_predicts_the_pixels_that_it_did(tmp_path):
    masking = {"class_path": "AttentionMasking", "init_args": {"low": 0.75, "high": 0.75, "whole": 0.0}}
    argument = saved(tmp_path, "tiny.yaml", standardise=False, masking=masking)
    method = instantiate(parse([argument, "--model=MomentumMAE"])).model
    assert isinstance(method, MomentumMAE)
    assert not method.target.standardise


def test_standardise_is_still_an_option_of_the_command_line():
    method = instantiate(parse([f"--config={TESTS / 'tiny.yaml'}", "--model.init_args.standardise=false"])).model
    assert not method.target.standardise


@pytest.mark.parametrize(
    "text",
    [
        "model: {class_path: HPM, init_args: {target: {class_path: PixelTarget, init_args: {standardise: true}}}}",
        "model: {class_path: MAE, init_args: {standardise: true, target: {class_path: PixelTarget}}}",  # refused later
        "whole: 1",  # nothing of a masking
        "model: [",
        "",
    ],
)
def test_a_config_without_old_names_stays_as_it_is(text):
    assert current_yaml(text) == text


def test_numbers_beside_an_old_name_stay_as_they_are_written(tmp_path):
    """The parser takes 1e-2 for a number, YAML 1.1 for text."""
    text = (TESTS / "tiny-ibot.yaml").read_text().replace("1.0e-2", "1e-2").replace("show_max: 0.3", "whole: 5e-1")
    (tmp_path / "old.yaml").write_text(text)
    config = parse([f"--config={tmp_path / 'old.yaml'}"])
    assert config.model.init_args.optim.blr == 0.01
    assert config.model.init_args.masking.init_args.unmasked_share == 0.5


def test_what_has_todays_names_is_handed_on_untouched():
    arguments = [f"--config={TESTS / 'tiny.yaml'}", "--seed=3", "--config=nothing.yaml", "--print_config"]
    assert current_arguments(arguments) == arguments

"""Of all that Lightning computes in, what a training here takes works, and the rest is refused by name."""

from pathlib import Path
from typing import get_args

import pytest
from hints import check_hint
from lightning.fabric import connector

from mim.cli import main
from mim.options.pretraining import Precision
from mim.run.config import parse, run_options

TINY = str(Path(__file__).parents[1] / "tiny.yaml")
KINDS = (connector._PRECISION_INPUT_STR, connector._PRECISION_INPUT_STR_ALIAS)
LIGHTNINGS = [name for kind in KINDS for name in get_args(kind)]
REFUSED = [name for name in LIGHTNINGS if name not in get_args(Precision)]


def test_mixed_and_single_precision_are_what_lightning_knows_by_these_names():
    assert set(get_args(Precision)) <= set(LIGHTNINGS)
    assert {"16-true", "bf16-true", "64-true", "64", "transformer-engine"} <= set(REFUSED)


@pytest.mark.parametrize("precision", REFUSED)
@pytest.mark.parametrize(
    "args",
    [
        ["pretrain", "--config", TINY],
        *([name, "--weights", "x", "--data", "shapes"] for name in ("finetune", "segment")),
    ],
    ids=["pretrain", "finetune", "segment"],
)
def test_whole_half_and_double_precision_are_refused_by_name_and_what_is_proposed_is_not(args, precision, capsys):
    command, *given = args
    assert main(command, [*given, "--precision", precision]) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: --precision cannot be {precision}\nwhy:   expected one of ")
    check_hint(command, text, given)


@pytest.mark.parametrize("precision", REFUSED)
def test_settings_of_a_file_are_refused_like_options(precision, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(Path(TINY).read_text() + f"trainer: {{precision: {precision}}}\n")
    assert main("pretrain", ["--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: --precision {precision}: weights and images stay float32 here\n")
    assert not (tmp_path / "run").exists()
    check_hint("pretrain", text)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_what_is_taken_from_the_command_line_is_taken_from_a_file(precision):
    assert run_options(parse([f"--config={TINY}", f"--trainer.precision={precision}"]))


@pytest.mark.middle
@pytest.mark.parametrize("precision", get_args(Precision))
def test_a_run_trains_in_every_precision_that_is_taken(precision, tmp_path):
    args = ["--config", TINY, "--out", tmp_path / "run", "--epochs", 0.05, "--precision", precision]
    assert main("pretrain", list(map(str, args))) == 0

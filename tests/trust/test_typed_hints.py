"""What stands behind ``try:`` is typed, in the folder and behind the command of the mistake: it does not come back."""

import re

import pytest
from hints import PLACEHOLDER, suggestions
from test_misconfigurations import EVALUATIONS, MISTAKES, OTHERS, TINY, place  # noqa: F401 - a fixture

from mim.cli import main

pytestmark = [pytest.mark.middle, pytest.mark.usefixtures("place", "quick_probes")]


class ReachedTraining(BaseException):
    """Everything that can be refused before the first step has been looked at."""


@pytest.fixture(autouse=True)
def _runs_end_where_training_begins(monkeypatch):
    def reached(*args):
        raise ReachedTraining

    monkeypatch.setattr("mim.commands.pretrain.Pretraining._fit", reached)


def proposals(text):
    """``(command or None, words)`` of the line ``try:`` that can be typed as they stand."""
    for line in text.splitlines():
        if line.startswith("try:"):
            for command, words in suggestions(line.removeprefix("try:").strip()):
                words = words[:2] if command is None else words  # prose may follow the value of an option
                if not any(PLACEHOLDER.search(word) for word in words):
                    yield command, words


def without(args, option):
    """The arguments but one option and its values."""
    kept, skipping = [], False
    for arg in args:
        skipping = arg.split("=")[0] == option or (skipping and not arg.startswith("--"))
        kept += [] if skipping else [arg]
    return kept


def answer(command, args, capsys):
    """The line ``error:``, or None for a command that works."""
    try:
        status = main(command, args)
    except ReachedTraining:
        status = 0
    except SystemExit as end:  # of --help_all
        status = end.code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert bool(status) == bool(errors)
    return errors[0] if errors else None


def check_typed(command, args, capsys):
    assert main(command, args) == 2
    text = capsys.readouterr().err
    mistake = text.splitlines()[0]
    if unknown := re.search(r"there is no option (--\S+)", mistake):
        args = without(args, unknown[1])
    for own, words in proposals(text):
        typed = words if own else [*without(args, words[0].split("=")[0]), *words]
        assert answer(own or command, typed, capsys) != mistake, (own or command, typed)


@pytest.mark.parametrize("args", [args for args, _ in MISTAKES.values()], ids=MISTAKES)
def test_a_mistake_in_a_run_does_not_come_back(args, capsys):
    config = [] if "--config" in args or "--method" in args else ["--config", TINY]
    check_typed("pretrain", [*config, *args], capsys)


@pytest.mark.parametrize(("command", "args"), [found[:2] for found in OTHERS.values()], ids=OTHERS)
def test_a_mistake_in_another_command_does_not_come_back(command, args, capsys):
    check_typed(command, args, capsys)


@pytest.mark.parametrize(("command", "args"), [found[:2] for found in EVALUATIONS.values()], ids=EVALUATIONS)
def test_an_evaluation_refused_for_an_option_is_not_refused_for_it_again(command, args, weights, capsys, monkeypatch):
    def reached(*args, **kwargs):
        raise ReachedTraining

    for measuring in ("classification.banks", "training.train_all"):
        monkeypatch.setattr(f"mim.transfer.{measuring}", reached, raising=False)
    check_typed(command, ["--weights", weights, *args], capsys)

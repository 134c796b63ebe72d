"""What stands behind ``try:`` is typed, in the folder and behind the command of the mistake: it does not come back."""

from pathlib import Path

import pytest
from situations import PLAIN, image, png, tar
from test_misconfigurations import EVALUATIONS, MISTAKES, OTHERS, TINY, place  # noqa: F401 - a fixture

from mim.cli import main

pytestmark = [pytest.mark.middle, pytest.mark.usefixtures("quick_probes")]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("args", [args for args, _ in MISTAKES.values()], ids=MISTAKES)
def test_a_mistake_in_a_run_does_not_come_back(args, typist):
    config = [] if "--config" in args or "--method" in args else ["--config", TINY]
    assert main("pretrain", [*config, *args]) == 2
    typist.type_all()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("command", "args"), [found[:2] for found in OTHERS.values()], ids=OTHERS)
def test_a_mistake_in_another_command_does_not_come_back(command, args, typist):
    assert main(command, args) == 2
    typist.type_all()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("command", "args"), [found[:2] for found in EVALUATIONS.values()], ids=EVALUATIONS)
def test_an_evaluation_refused_for_an_option_is_not_refused_for_it_again(command, args, weights, typist):
    assert main(command, ["--weights", weights, *args]) == 2
    typist.type_all()


@pytest.fixture
def work(tmp_path, monkeypatch, weights):
    """A working folder with six photos, a tar file of photos, a text and a link to an encoder."""
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        image(f"photos/{number}.png")
    tar("plain.tar", {f"{number}.png": png() for number in range(4)})
    Path("text.md").write_text("# A text\n")
    Path("backbone").symlink_to(weights)
    return weights


@pytest.mark.parametrize("call", PLAIN.values(), ids=PLAIN)
def test_a_refused_option_is_not_refused_again(call, work, typist):
    command, *args = [work if word == "WEIGHTS" else word for word in call]
    assert main(command, args) == 2
    typist.type_all()

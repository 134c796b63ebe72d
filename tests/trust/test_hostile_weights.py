"""Weights from strangers: nothing in them is run, nothing is believed, and every command says so in three lines."""

import json
import socket
from hashlib import sha256
from pathlib import Path

import hostile_weights
import pytest
import torch

from mim.cli import main
from mim.errors import UserError
from mim.run.checkpoint_files import AtomicCheckpointIO, checkpoint_name, sidecar
from mim.run.config import instantiate, parse, save_config

TINY = str(Path(__file__).parents[1] / "tiny.yaml")
CASES = list(hostile_weights.cases())
EVALUATION = ["--data", "shapes", "--device", "cpu", "--num_workers", "0"]
COMMANDS = {
    "pretrain": lambda weights, out: ["--config", TINY, "--out", out, "--init", weights],
    "knn": lambda weights, out: ["--weights", weights, *EVALUATION, "--out", out],
    "linear_probe": lambda weights, out: ["--weights", weights, *EVALUATION, "--out", out],
    "finetune": lambda weights, out: ["--weights", weights, *EVALUATION, "--out", out],
    "segment": lambda weights, out: ["--weights", weights, "--data", "shapes", "--crop", "32", "--out", out],
    "export": lambda weights, out: ["--weights", weights, "--out", out],
}
"""Every command that takes weights from anywhere."""


def refusal(command, weights, tmp_path, capsys):
    """The text that a command ends with; it has to be three lines, and nothing may have run."""
    args = COMMANDS[command](str(weights), str(tmp_path / "out"))
    if command != "pretrain" and weights.suffix:
        args += ["--model", "test_vit"]
    assert main(command, args) == 2
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert lines[0].startswith("error: ")
    assert str(weights) in lines[0], "the message names the file"
    assert len(lines) <= 3
    assert "Traceback" not in text
    assert not list(tmp_path.rglob("executed"))
    assert not (tmp_path / "out").exists()
    return text


def test_there_are_as_many_cases_as_the_documents_say():
    assert len(CASES) == len({case.name for case in CASES}) == 123


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_a_hostile_file_ends_in_three_lines_and_runs_nothing(number, tmp_path, capsys):
    case, command = CASES[number], list(COMMANDS)[number % len(COMMANDS)]
    if case.name.startswith("timm-folder-") and case.name != "timm-folder-without-weights" and command == "pretrain":
        command = "knn"  # --init takes the weights of such a folder and builds no model from it
    case.make(tmp_path / case.name)
    refusal(command, tmp_path / case.name, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_hostile_file_is_refused_by_every_command(command, tmp_path, capsys):
    for number, case in enumerate(CASES):
        if case.name.startswith("timm-folder-") and command == "pretrain":
            continue
        place = tmp_path / str(number)
        place.mkdir()
        case.make(place / case.name)
        refusal(command, place / case.name, place, capsys)


def test_the_canary_does_sing_where_code_is_run(tmp_path):
    path = tmp_path / "x.pth"
    next(case for case in CASES if case.name == "touch-bare-zip.pth").make(path)
    with pytest.raises(AttributeError):  # what `touch` returns is no checkpoint
        torch.load(path, weights_only=False).items()
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.pth", "hf-hub:someone/something", "s3://bucket/x.pth"])
def test_an_address_is_not_fetched(address, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for command in COMMANDS:
        assert main(command, COMMANDS[command](address, str(tmp_path / "out"))) == 2
        assert "no such file" in capsys.readouterr().err.splitlines()[0]


# A run folder from a stranger, whose hash is right --------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder without a checkpoint, and its method."""
    folder = tmp_path_factory.mktemp("stranger") / "run"
    (folder / "checkpoints").mkdir(parents=True)
    config = parse([f"--config={TINY}"])
    save_config(config, folder / "config.yaml")
    (folder / "command.txt").write_text("python -m mim pretrain")
    return folder, instantiate(config).model


def forge(folder, write):
    """A checkpoint of any content that its sidecar vouches for."""
    path = folder / "checkpoints" / checkpoint_name(4)
    write(path)
    facts = {"sha256": sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size, "step": 4}
    sidecar(path).write_text(json.dumps(facts))
    return path


@pytest.mark.parametrize("case", [case for case in CASES if Path(case.name).suffix], ids=lambda case: case.name)
def test_a_forged_checkpoint_is_not_loaded(case, run):
    folder, method = run
    path = forge(folder, case.make)
    with pytest.raises(UserError, match="cannot be used"):
        AtomicCheckpointIO(method).load_checkpoint(path)
    assert not (path.parent / "executed").exists()


def nearly_right(method, change):
    """The state of a run after its first steps, with one thing changed."""
    state = {"state_dict": dict(method.state_dict()), "optimizer_states": [], "loops": {}, "global_step": 4}
    change(state)
    return lambda path: torch.save(state, path)


CHANGES = {
    "nan": lambda state: state["state_dict"].update({"mask_token": torch.full((1, 1, 32), torch.nan)}),
    "shape": lambda state: state["state_dict"].update({"mask_token": torch.zeros(1, 1, 33)}),
    "no tensor": lambda state: state["state_dict"].update({"mask_token": "text"}),
    "missing": lambda state: state["state_dict"].popitem(),
    "more": lambda state: state["state_dict"].update({"other": torch.zeros(1)}),
    "optimizer": lambda state: state.update(optimizer_states=[{"state": {0: {"exp_avg": torch.zeros(7, 77)}}}]),
    "optimizer nan": lambda state: state.update(
        optimizer_states=[{"state": {0: {"exp_avg": torch.tensor(torch.inf)}}}]
    ),
    "no optimizer": lambda state: state.pop("optimizer_states"),
    "a list": lambda state: state.update(state_dict=[1, 2]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_forged_checkpoint_that_nearly_fits_is_not_loaded(change, run):
    folder, method = run
    path = forge(folder, nearly_right(method, change))
    with pytest.raises(UserError, match="cannot be used") as stop:
        AtomicCheckpointIO(method).load_checkpoint(path)
    assert len(str(stop.value).splitlines()) == 3


@pytest.mark.parametrize("command", ["resume", "knn", "export", "compare"])
@pytest.mark.parametrize("name", ["touch-beside-zip.pth", "nan.pth"])
def test_commands_on_a_forged_run_end_in_three_lines(command, name, run, capsys, tmp_path):
    folder, _ = run
    forge(folder, next(case for case in CASES if case.name == name).make)
    (folder / "summary.json").write_text("{}")
    args = {
        "resume": ["--resume", str(folder)],
        "knn": ["--weights", str(folder), *EVALUATION],
        "export": ["--run", str(folder), "--out", str(tmp_path / "export")],
        "compare": ["--runs", str(folder), "--out", str(tmp_path / "compare")],
    }
    assert main("pretrain" if command == "resume" else command, args[command]) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 3
    assert checkpoint_name(4) in text.splitlines()[0]
    assert not list(folder.rglob("executed"))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '"text"'])
def test_a_damaged_summary_is_named(text, run, capsys):
    folder, _ = run
    (folder / "summary.json").write_text(text)
    assert main("info", ["run", str(folder)]) == 2
    assert "summary.json is damaged" in capsys.readouterr().err

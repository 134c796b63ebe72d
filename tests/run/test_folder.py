"""The folder of a run: numbered, never shared, found again."""

import json
import shlex
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from mim.errors import UserError
from mim.run.folder import RunFolder, versions


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(path, status=None):
    """A run as far as its folder shows it."""
    run = RunFolder(Path(path))
    run.path.mkdir(parents=True)
    run.config.write_text("epochs: 1\n")
    if status:
        run.write_summary(status=status)
    return run


def test_runs_are_numbered():
    names = [RunFolder.create(None, "mae-photos").path for _ in range(3)]
    assert names == [Path("runs/001-mae-photos"), Path("runs/002-mae-photos"), Path("runs/003-mae-photos")]
    assert all(path.is_dir() for path in names)


@pytest.mark.parametrize(
    ("there", "expected"),
    [(["007-x", "003-y"], "008-new"), (["notes", "ab1-x"], "001-new"), (["999-x", "1000-y"], "1001-new")],
)
def test_numbers_follow_the_largest_one(there, expected):
    for name in there:
        (Path("runs") / name).mkdir(parents=True)
    assert RunFolder.create(None, "new").path.name == expected


def create_some(name):
    return [RunFolder.create(None, name).path for _ in range(20)]


def test_processes_that_start_at_once_do_not_share_a_folder():
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        paths = [path for paths in pool.map(create_some, ["mae-photos"] * 2) for path in paths]
    assert len(set(paths)) == 40


def test_a_given_folder_is_made_with_its_parents():
    assert RunFolder.create("a/b/c", "unused").path.is_dir()


def test_an_existing_folder_without_a_run_may_be_used():
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    RunFolder.create("out", "unused")
    assert [path.name for path in Path("out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(("status", "text"), [("done", "it has finished"), ("interrupted", "it has not finished")])
def test_a_folder_that_holds_a_run_is_refused(status, text):
    make("out", status)
    with pytest.raises(UserError, match="--out out holds a run already") as mistake:
        RunFolder.create("out", "unused")
    assert mistake.value.why == text
    assert "--resume out" in mistake.value.hint


def test_overwriting_removes_what_the_run_left_and_nothing_else():
    run = make("out", "done")
    for name in ("images", "checkpoints", "export/backbone", "tensorboard", "mine"):
        (run.path / name).mkdir(parents=True)
    for file in (run.metrics, run.bad_files, run.log, run.path / "mine.txt", run.path / "timing.csv"):
        file.write_text("x")
    RunFolder.create("out", "unused", overwrite=True)
    assert {path.name for path in run.path.iterdir()} == {"mine", "mine.txt"}


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_a_mistake_of_the_user(out):
    Path("file").touch()
    with pytest.raises(UserError, match=f"--out {out} cannot be written"):
        RunFolder.create(out, "unused")


def test_a_place_without_room_for_runs_is_a_mistake_of_the_user():
    Path("runs").touch()
    with pytest.raises(UserError, match="runs cannot be written"):
        RunFolder.create(None, "mae-photos")


# Found again ---------------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_its_folder():
    make("runs/001-a", "done")
    assert RunFolder.find("runs/001-a").path == Path("runs/001-a")


def test_a_folder_without_a_run_is_refused_with_those_there_are():
    make("runs/001-a")
    with pytest.raises(UserError, match="--resume runs/2: no run there") as mistake:
        RunFolder.find("runs/2")
    assert mistake.value.hint == "--resume runs/001-a"


def test_auto_takes_the_newest_unfinished_run():
    for number, status in enumerate(["interrupted", "running", None, "done"], 1):
        make(f"runs/{number:03d}-a", status)
    assert RunFolder.find("auto").path == Path("runs/003-a")


def test_newest_is_by_number_beyond_three_digits():
    make("runs/999-a")
    make("runs/1000-a")
    assert RunFolder.find("auto").path == Path("runs/1000-a")


def test_auto_passes_over_folders_without_a_run():
    make("runs/001-a")
    Path("runs/002-b").mkdir()
    Path("runs/notes.txt").touch()
    assert RunFolder.find("auto").path == Path("runs/001-a")


def test_auto_looks_at_the_given_folder_only():
    make("runs/001-a")
    assert RunFolder.find("auto", "elsewhere") is None
    make("elsewhere", "interrupted")
    assert RunFolder.find("auto", "elsewhere").path == Path("elsewhere")


def test_auto_finds_nothing_where_all_is_done():
    assert RunFolder.find("auto") is None
    make("runs/001-a", "done")
    assert RunFolder.find("auto") is None


# What it writes ------------------------------------------------------------------------------------------------------


def test_facts_add_up_in_the_summary():
    run = make("out")
    run.write_summary(status="running", steps=10)
    run.write_summary(status="done", loss=0.5)
    assert run.read_summary() == {"status": "done", "steps": 10, "loss": 0.5}


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_summary_is_never_half_written(monkeypatch):
    run = make("out", "running")
    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.write_summary(status="done")
    assert json.loads(run.summary.read_text()) == {"status": "running"}


def test_a_run_that_says_nothing_is_running():
    assert make("out").status() == "running"


def test_the_command_can_be_pasted_into_a_shell():
    run = make("out")
    run.write_origin(["--data.path=my photos/a'b"])
    assert shlex.split((run.path / "command.txt").read_text())[-1] == "--data.path=my photos/a'b"


def test_the_environment_names_what_a_result_depends_on():
    run = make("out")
    run.write_origin([])
    lines = dict(line.split(" ", 1) for line in (run.path / "env.txt").read_text().splitlines())
    assert {"python", "system", "torch", "timm", "mim-suite"} <= lines.keys()
    assert lines["torch"] == versions()["torch"]


def test_what_is_said_is_kept(capsys):
    run = make("out")
    run.say("one")
    run.say("two")
    assert capsys.readouterr().out == run.log.read_text() == "one\ntwo\n"

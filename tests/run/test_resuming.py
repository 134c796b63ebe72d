"""A resumed run and what else its command says: the same, what may change, or refused; never dropped."""

import shutil
from pathlib import Path

import pytest
from hints import check_hint
from situations import image

from mim.cli import main
from mim.options.pretraining import translate
from mim.run.config import parse
from mim.run.folder import RunFolder
from mim.run.resuming import resumed_arguments

TINY = Path(__file__).parents[1] / "tiny.yaml"
IBOT = TINY.with_name("tiny-ibot.yaml")
OTHER = TINY.read_text().replace("RandomMasking}", "RandomMasking, init_args: {ratio: 0.5}}")
CALL = ["--config", "mine.yaml", "--data", "photos", "--out", "runs/001-mine", "--epochs", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resuming")
    (folder / "mine.yaml").write_text(TINY.read_text())
    for number in range(8):
        image(folder / "photos" / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main("pretrain", CALL) == 0
    (folder / "runs").rename(folder / "as they were")
    return folder


@pytest.fixture
def run(finished, monkeypatch):
    """In its working folder, a run that began with a config and is unfinished by its own word."""
    monkeypatch.chdir(finished)
    shutil.rmtree("runs", ignore_errors=True)
    shutil.copytree("as they were", "runs")
    Path("mine.yaml").write_text(TINY.read_text())
    summary = Path("runs/001-mine/summary.json")
    summary.write_text(summary.read_text().replace('"done"', '"interrupted"'))
    return Path("runs/001-mine")


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("resume", ["runs/001-mine", "auto"])
def test_the_command_that_began_a_run_goes_on_with_it(resume, capsys):
    assert main("pretrain", [*CALL, "--resume", resume]) == 0
    assert "differ" not in capsys.readouterr().err


@pytest.mark.parametrize("resume", ["runs/001-mine", "auto"])
def test_a_config_that_says_otherwise_is_refused(resume, run, capsys):
    Path("mine.yaml").write_text(OTHER)
    assert main("pretrain", [*CALL, "--resume", resume]) == 2
    text = capsys.readouterr().err
    assert f"--resume {run}: 1 setting differs from the saved run" in text
    assert "0.75 -> 0.5" in text
    check_hint("pretrain", text, [*CALL, "--resume", resume])


def test_what_may_change_is_taken_from_a_config(run):
    Path("mine.yaml").write_text(TINY.read_text() + "save_every: 0.5\n")
    args = resumed_arguments(RunFolder(run), translate([*CALL, "--resume", str(run)]))
    assert parse(args).save_every == 0.5


@pytest.mark.parametrize("resume", ["runs/001-mine", "auto"])
def test_a_config_of_another_method_is_refused(resume, run, capsys, typist):
    assert main("pretrain", ["--config", str(IBOT), "--data", "photos", "--resume", resume]) == 2
    assert f"--resume {run} is a run of MAE, and --config {IBOT} one of IBOT" in capsys.readouterr().err
    typist.type_all()


@pytest.mark.usefixtures("run")
def test_another_method_beside_auto_is_refused(capsys, typist):
    assert main("pretrain", ["--method", "ibot", "--data", "photos", "--resume", "auto"]) == 2
    assert "--method ibot: runs/001-mine/config.yaml is one of mae" in capsys.readouterr().err
    typist.type_all()


@pytest.mark.usefixtures("run")
def test_a_recipe_beside_a_named_run_counts_as_its_options(capsys):
    assert main("pretrain", ["--config", "mae/demo", "--data", "photos", "--resume", "runs/001-mine"]) == 2
    assert "settings differ" in capsys.readouterr().err
    assert main("pretrain", ["--config", "ibot/demo", "--data", "photos", "--resume", "runs/001-mine"]) == 2
    assert "is a run of MAE" in capsys.readouterr().err


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("args", [["--resume", "auto"], ["--resume", "auto", "--method", "mae"]])
def test_auto_without_a_config_goes_on_with_what_there_is(args):
    assert main("pretrain", args) == 0

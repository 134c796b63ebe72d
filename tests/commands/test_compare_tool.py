"""``tools/compare.py``, driven as a user drives it."""

from pathlib import Path

import pytest

from mim.cli import main

pytestmark = pytest.mark.usefixtures("quick_probes")

TINY = str(Path(__file__).parents[1] / "tiny.yaml")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two seeds of the tiny run, trained and compared."""
    folder = tmp_path_factory.mktemp("compare")
    arguments = ["--methods", TINY, "--data", "shapes", "--epochs", "0.1", "--images", "2", "--out", str(folder)]
    assert main("compare", [*arguments, "--seeds", "2"]) == 0
    return folder, arguments


def test_runs_that_differ_in_their_seed_share_a_row_beside_the_untrained(compared):
    rows = (compared[0] / "summary.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["", "---", "tiny", "untrained"]
    assert rows[2].split("|")[2].strip() == "2"
    assert rows[2].count("±") == rows[3].count("±") == 2  # k-NN and linear


def test_the_page_shows_the_same_images_and_needs_nothing_else(compared):
    page = (compared[0] / "compare.html").read_text()
    assert page.count("<img") == 1
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.middle
def test_finished_trainings_are_not_repeated_and_evaluations_become_columns(compared, monkeypatch, capsys):
    folder, arguments = compared
    assert main("knn", ["--weights", str(folder / "tiny-seed-0"), "--data", "shapes", "--num_workers", "0"]) == 0
    assert "k-NN classification" in (folder / "tiny-seed-0" / "report.html").read_text()
    monkeypatch.setattr("mim.commands.pretrain.main", None)
    assert main("compare", [*arguments, "--seeds", "2"]) == 0
    assert "knn 20-NN top-1" in capsys.readouterr().out


def test_runs_are_collected(compared, tmp_path, capsys):
    run = compared[0] / "tiny-seed-1"
    assert main("compare", ["--runs", str(run), "--images", "1", "--out", str(tmp_path / "one")]) == 0
    assert "±" in capsys.readouterr().out  # of the probe's seeds


def test_a_page_that_cannot_be_written_is_refused_before_the_runs_are_read(compared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mim.run.comparison.collect", None)
    (tmp_path / "file").touch()
    assert main("compare", ["--runs", str(compared[0] / "tiny-seed-1"), "--out", str(tmp_path / "file")]) == 2
    assert f"--out {tmp_path / 'file'} cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "expected"),
    [([], "nothing to compare"), (["--runs", "nowhere"], "no run there"), (["--methods", "mea"], "--method mea")],
)
def test_mistakes_end_in_a_message(args, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("compare", args) == 2
    assert expected in capsys.readouterr().err

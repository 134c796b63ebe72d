"""``tools/compare.py``, driven as a user drives it."""

from pathlib import Path

import pytest
import yaml

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
def test_finished_trainings_are_not_repeated_and_evaluations_become_columns(compared, capsys):
    folder, arguments = compared
    assert main("knn", ["--weights", str(folder / "tiny-seed-0"), "--data", "shapes", "--num_workers", "0"]) == 0
    assert "k-NN classification" in (folder / "tiny-seed-0" / "report.html").read_text()
    rows = (folder / "tiny-seed-0" / "metrics.csv").read_bytes()
    assert main("compare", [*arguments, "--seeds", "2"]) == 0
    assert "knn 20-NN top-1" in capsys.readouterr().out
    assert (folder / "tiny-seed-0" / "metrics.csv").read_bytes() == rows
    assert main("compare", [*arguments, "--seeds", "2", "--batch_size", "8"]) == 2
    assert "data.batch_size                          16 -> 8" in capsys.readouterr().err


def test_options_of_pretraining_go_to_every_training(tmp_path, capsys):
    methods = f"{TINY},{TINY}+GridMasking"
    given = ["--seeds", "1", "--images", "1", "--batch_size", "8", "--pictures", "0", "--patch-size=4"]
    command = ["--methods", methods, "--data", "shapes", "--epochs", "0.02", "--out", str(tmp_path), *given]
    assert main("compare", command) == 0
    for name in ("tiny", "tiny-GridMasking"):
        config = yaml.safe_load((tmp_path / f"{name}-seed-0" / "config.yaml").read_text())
        assert (config["data"]["batch_size"], config["model"]["init_args"]["encoder"]["patch_size"]) == (8, 4)


@pytest.mark.parametrize(("option", "near"), [("--seed", "--seeds 3"), ("--batchsize", "--batch_size 3")])
def test_options_of_a_single_run_or_of_nothing_are_refused(option, near, capsys):
    assert main("compare", ["--methods", "mae", option, "3"]) == 2
    assert capsys.readouterr().err == f"error: there is no option {option}\ntry:   {near}\n"


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

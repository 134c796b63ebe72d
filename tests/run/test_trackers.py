"""Curves, pictures, settings and the report of a run in Weights & Biases (offline) and in MLflow (a SQLite file)."""

import csv
import json
from pathlib import Path

import pytest

from mim.cli import main
from mim.errors import UserError
from mim.run.names import check_trackers

TINY = Path(__file__).parents[1] / "tiny.yaml"


def test_a_tracker_that_is_not_installed_is_refused_with_what_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        check_trackers(["mlflow"])
    assert refused.value.hint == "pip install mim-suite[mlflow]"


@pytest.mark.middle
def test_mlflow_holds_curves_settings_strips_and_report_and_a_resumed_run_goes_on_in_its_entry(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow")
    monkeypatch.chdir(tmp_path)
    assert main("pretrain", ["--config", str(TINY), "--log", "mlflow", "--out", "runs/a"]) == 0
    assert main("pretrain", ["--resume", "runs/a", "--epochs", "0.5"]) == 0
    run, client = Path("runs/a"), mlflow.MlflowClient("sqlite:///runs/mlflow.db")
    entry = json.loads((run / "trackers.json").read_text())["mlflow"]
    with (run / "metrics.csv").open(newline="") as file:
        rows = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    curve = {metric.step: metric.value for metric in client.get_metric_history(entry, "train/loss")}
    assert curve == rows
    assert client.get_run(entry).data.params["model.class_path"] == "mim.methods.MAE"
    assert {file.path for file in client.list_artifacts(entry)} == {"images", "report.html"}
    assert len(client.list_artifacts(entry, "images")) == len(list((run / "images").glob("epoch_*")))


@pytest.mark.middle
def test_weights_and_biases_keeps_an_offline_run_with_strips_and_report(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    assert main("pretrain", ["--config", str(TINY), "--log", "tensorboard,wandb", "--out", "runs/a"]) == 0
    entry = json.loads(Path("runs/a/trackers.json").read_text())["wandb"]
    (folder,) = Path("runs/a/wandb").glob(f"offline-run-*-{entry}")
    strips = list(Path("runs/a/images").glob("epoch_*"))
    assert len(list((folder / "files" / "media" / "images").iterdir())) == len(strips)
    assert b"train/loss" in next(folder.glob("*.wandb")).read_bytes()
    assert list(Path("runs/a/tensorboard").iterdir())


@pytest.mark.parametrize("names", ["wanb", "tensorboard,comet", "[wandb,x]"])
def test_an_unknown_tracker_is_told_with_one_that_there_is(names, capsys):
    assert main("pretrain", ["--log", names]) == 2
    assert "try:   --log tensorboard" in capsys.readouterr().err

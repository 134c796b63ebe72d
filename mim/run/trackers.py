"""Where else a run's curves, pictures and settings go: TensorBoard's files beside it, Weights & Biases, MLflow."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from mim.options.pretraining import Tracker
from mim.run.folder import RunFolder

PROJECT = "mim"
"""Where both keep runs together, unless their own variables of the environment say otherwise."""


def build_trackers(names: Sequence[Tracker], run: RunFolder, settings: Mapping[str, Any]) -> list[Logger]:
    """Lightning's loggers by name; a new entry gets the settings, a resumed run goes on in its own."""
    known: dict[str, str] = json.loads(run.trackers.read_text()) if run.trackers.is_file() else {}
    trackers = {name: _build(name, run, known.get(name)) for name in names}
    for name, tracker in trackers.items():
        if name != "tensorboard" and name not in known:  # config.yaml lies beside TensorBoard's files
            tracker.log_hyperparams(dict(settings))
            known[name] = _entry(tracker)
    if known:
        run.trackers.write_text(json.dumps(known) + "\n")
    return list(trackers.values())


def _build(name: Tracker, run: RunFolder, entry: str | None) -> Logger:
    if name == "tensorboard":
        return TensorBoardLogger(run.path, name="tensorboard", version="")
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        again: dict[str, Any] = {"resume": "allow"} if entry else {}
        return WandbLogger(name=run.path.name, save_dir=run.path, project=project, id=entry, **again)
    return MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
        run_name=run.path.name,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run.path.parent.absolute() / 'mlflow.db'}"),
        run_id=entry,
    )


def _entry(tracker: Logger) -> str:
    """What the tracker calls this run."""
    return str(tracker.run_id if isinstance(tracker, MLFlowLogger) else tracker.version)


def track_picture(trackers: Sequence[Logger], picture: Path, step: int) -> None:
    """Hands a picture strip to those trackers that show pictures."""
    for tracker in trackers:
        if isinstance(tracker, WandbLogger):
            tracker.log_image("strip", [str(picture)], step=step)
        elif isinstance(tracker, MLFlowLogger):
            tracker.experiment.log_artifact(tracker.run_id, str(picture), "images")


def track_report(trackers: Sequence[Logger], report: Path) -> None:
    """Hands the report of a finished run to the trackers, as an artifact, and closes its entries."""
    for tracker in trackers:
        if isinstance(tracker, WandbLogger):
            tracker.experiment.log_artifact(str(report), name=f"report-{tracker.experiment.id}", type="report")
            tracker.experiment.finish()
        elif isinstance(tracker, MLFlowLogger):
            tracker.experiment.log_artifact(tracker.run_id, str(report))
            tracker.finalize("success")

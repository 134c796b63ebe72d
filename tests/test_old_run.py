"""Runs, checkpoints and exports of version 0.1.0 load, go on and measure as they did (``tests/old_run``)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mim.cli import main

OLD = Path(__file__).parent / "old_run"
RUNS = ["mae", *(pytest.param(name, marks=pytest.mark.middle) for name in ("attmask", "hpm", "momentum_mae"))]
# The same machine gives the same bits; another processor sums in another order, and 16 steps of AdamW carry that on.
NEAR = {"rtol": 1e-3, "atol": 1e-4}
SINCE_THEN = ["val/knn_balanced", "val/linear_balanced"]
"""Columns of ``metrics.csv`` that came later."""


@pytest.fixture
def run(tmp_path, request):
    """A copy of an old run, as it stood after step 12."""
    folder = tmp_path / request.param
    shutil.copytree(OLD / request.param, folder, ignore=shutil.ignore_patterns("export", "evaluation"))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    return folder


def table(path: Path) -> dict[str, torch.Tensor]:
    """The numbers by column."""
    heading, *rows = [line.split(",") for line in path.read_text().splitlines()]
    columns = zip(*rows, strict=True)
    numbers = [torch.tensor([float(cell) if cell else torch.nan for cell in column]) for column in columns]
    return dict(zip(heading, numbers, strict=True))


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_an_old_run_resumes_to_its_own_end(run):
    assert main("pretrain", ["--resume", str(run)]) == 0
    old = OLD / run.name
    numbers, measured = table(old / "metrics.csv"), table(run / "metrics.csv")
    later = [measured.pop(name) for name in SINCE_THEN]  # and empty in the rows that were there before
    assert all(bool(column[:-1].isnan().all()) and not column[-1].isnan() for column in later)
    torch.testing.assert_close(measured, numbers, equal_nan=True, **NEAR)
    before, now = (load_file(folder / "export" / "backbone" / "model.safetensors") for folder in (old, run))
    torch.testing.assert_close(now, before, **NEAR)


EVALUATIONS = {
    "knn": "knn --k [5] --seeds 1 --pool cls",
    "linear": "linear_probe --epochs 3 --warmup_epochs 1 --lrs [0.1] --seeds 1 --pool cls",
    "segment-linear": "segment --steps 4 --batch_size 4 --seeds 1 --pictures 0",
    "finetune-evit-0.7": "finetune --epochs 0.2 --batch_size 32 --seeds 1 --reduction evit:0.7 --from_scratch false",
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("knn", "finetune-evit-0.7") else pytest.param(name, marks=pytest.mark.middle)
        for name in EVALUATIONS
    ],
)
def test_an_old_export_measures_as_it_did(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # caches of features are new
    run = tmp_path / "mae"
    shutil.copytree(OLD / "mae", run, ignore=shutil.ignore_patterns("evaluation"))
    command, *options = EVALUATIONS[name].split()
    assert main(command, ["--weights", str(run), "--data", "shapes", "--num_workers", "0", *options]) == 0
    before, now = (
        json.loads((folder / "evaluation" / name / "metrics.json").read_text()) for folder in (OLD / "mae", run)
    )
    for what, scores in before["metrics"].items():
        if isinstance(scores, list):
            assert now["metrics"][what] == pytest.approx(scores, abs=0.02), what


def test_an_old_fine_tuned_model_loads_with_its_reduction(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export = OLD / "mae" / "evaluation" / "finetune-evit-0.7" / "export"
    arguments = ["--weights", str(export), "--reduction", str(export), "--data", "shapes", "--k", "[5]", "--seeds", "0"]
    assert main("knn", [*arguments, "--num_workers", "0", "--out", "scores"]) == 0
    facts = json.loads(Path("scores/metrics.json").read_text())
    assert facts["reduction"]["settings"].startswith("TopKPruning(schedule=KeepRate(keep=0.7")

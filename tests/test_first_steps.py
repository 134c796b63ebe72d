"""The notebook in ``docs/`` runs from top to bottom, and shows what it gave."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"


def code_cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_every_cell_shows_its_output_and_the_file_is_small():
    kinds = [{output["output_type"] for output in cell["outputs"]} for cell in code_cells()]
    assert all(kinds)
    assert not any("error" in kind for kind in kinds)
    assert NOTEBOOK.stat().st_size < 100_000


def test_it_names_no_machine():
    assert not re.search(r"/(home|root|tmp|usr|work|opt|Users)/", NOTEBOOK.read_text())


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
    script = tmp_path / "first_steps.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in code_cells()))
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert "error: there is no option --epoch\ntry:   did you mean --epochs?" in run.stdout
    assert (tmp_path / "first_steps" / "patches.png").is_file()
    assert (tmp_path / "first_steps" / "evaluation" / "knn" / "metrics.json").is_file()

"""What ``pip install`` gives people: built from a source archive, used in an empty folder, without the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

from mim.cli import COMMANDS
from mim.options.recipes import recipe_names
from mim.program import called

ROOT = Path(__file__).parents[1]
SOURCES = ("mim", "configs", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
# Whatever else of us lies on the path, such as an editable installation, is taken off it.
ALONE = """
import os, sys
here = os.path.dirname(__file__)
sys.path[:] = [place for place in sys.path if place == here or not os.path.isdir(os.path.join(place, "mim"))]
"""


def answer(command, folder, **env):
    result = subprocess.run(
        command, cwd=folder, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return result.returncode, result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package, made from a wheel, made from a source archive; and ``start(*command)`` in another."""
    source, built, target = (tmp_path_factory.mktemp(name) for name in ("source", "built", "installed"))
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    make = f"import setuptools.build_meta as backend; backend.build_sdist({str(built)!r})"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    quick = ["--no-deps", "--no-index", "--no-build-isolation"]
    assert answer([sys.executable, "-c", make], source)[0] == 0
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(built, filter="data")
    unpacked = next(path for path in built.iterdir() if path.is_dir())
    status, output = answer([*pip, "wheel", *quick, "-w", built, unpacked], built)
    assert status == 0, output
    status, output = answer([*pip, "install", *quick, "--target", target, next(built.glob("*.whl"))], built)
    assert status == 0, output
    (target / "sitecustomize.py").write_text(ALONE)
    return target


@pytest.fixture
def start(installed, tmp_path):
    def run(*command):
        return answer(command, tmp_path, PYTHONPATH=str(installed), OMP_NUM_THREADS="1")

    return run


def test_the_main_job_runs_in_an_empty_folder(start, installed, tmp_path):
    tiny = ["--model.init_args.encoder.kwargs", "{embed_dim: 32, depth: 1, num_heads: 2}", "--probe_images", "20"]
    status, output = start(sys.executable, "-m", "mim", "pretrain", *tiny, "--epochs", "0.0625", "--pictures", "1")
    assert status == 0, output
    run = tmp_path / "runs" / "001-mae-builtin"
    assert len((run / "metrics.csv").read_text().splitlines()) >= 3  # a head, the untrained encoder, the last step
    assert yaml.safe_load((run / "config.yaml").read_text())["epochs"] == 0.0625
    assert "--config=mae/demo" in (run / "command.txt").read_text()
    assert str(installed) not in output + (run / "command.txt").read_text()
    assert "python -m mim pretrain --resume runs/001-mae-builtin" in output


def test_its_recipes_are_those_of_the_checkout(installed):
    home = installed / "mim" / "configs"
    assert sorted(str(file.relative_to(home).with_suffix("")) for file in home.rglob("*.yaml")) == recipe_names()


def test_a_mistake_is_answered_in_the_form_of_the_installed_script(start, installed):
    status, output = start(installed / "bin" / "mim-info", "run", "nowhere")
    assert (status, output.splitlines()[-1]) == (2, "try:   begin one:  mim-pretrain")


def test_every_command_has_a_script():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {f"mim-{name.replace('_', '-')}": "mim.cli:main" for name in COMMANDS}


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        ("tools/pretrain.py", "python tools/linear_probe.py"),
        ("../my mim/tools/knn.py", "python '../my mim/tools/linear_probe.py'"),
        ("/usr/bin/mim-knn", "mim-linear-probe"),
        ("/usr/lib/mim/__main__.py", "python -m mim linear_probe"),
        ("/somewhere/notebook.py", "python -m mim linear_probe"),
    ],
)
def test_a_command_is_named_in_the_form_in_which_the_program_was_started(started, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    assert called("linear_probe") == expected

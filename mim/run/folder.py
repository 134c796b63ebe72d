"""The folder of a run: numbered, with fixed names for everything that a run leaves behind."""

import errno
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from mim.atomic import replaced
from mim.data.bad_files import BadFileWarning
from mim.errors import MachineError, UserError
from mim.options.outputs import free_bytes
from mim.program import called, origin
from mim.terminal import paint, watched

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
"""What a disk answers that is full, read-only, forbidden or broken."""


class RunFolder:
    """Paths inside a run folder.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.csv"
        self.summary = path / "summary.json"
        self.bad_files = path / "bad_files.txt"
        self.log = path / "log.txt"
        self.images = path / "images"
        self.checkpoints = path / "checkpoints"
        self.backbone = path / "export" / "backbone"
        self.debug = path / "debug"
        self.trackers = path / "trackers.json"

    def nan_dump(self, step: int) -> Path:
        """What is kept of a step that was not finite."""
        return self.debug / f"nan_step_{step:06d}.pt"

    @classmethod
    def create(cls, out: str | None, name: str, overwrite: bool = False) -> "RunFolder":
        """Makes ``out``, or the next ``runs/NNN-name``; a folder that holds a run already is refused."""
        if out is None:
            try:
                return cls(_numbered(Path("runs"), name))
            except OSError as error:
                hint = "--out another/folder"
                raise UserError(f"runs cannot be written: {error.strerror}", hint=hint) from error
        path = Path(out)
        run = cls(path)
        run.check_free(overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / ".writable").touch()
            (path / ".writable").unlink()
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}", hint="--out another/folder") from error
        if overwrite:
            run._clear()
        return run

    @classmethod
    def find(cls, resume: str, out: str | None = None) -> "RunFolder | None":
        """The run that ``--resume`` names.

        For ``auto`` that is the run in ``out``, or without it the newest unfinished one under ``runs``; ``None`` if
        there is none yet.
        """
        if resume != "auto":
            run = cls(Path(resume))
            if run.path.is_file():
                raise _file_to_resume(run.path)
            if not run.config.is_file():
                raise UserError(f"--resume {resume}: no run there", hint=named_run("--resume", 3))
            return run
        folders = [Path(out)] if out else sorted(Path("runs").glob("*"), key=_number, reverse=True)
        runs = [cls(folder) for folder in folders if (folder / "config.yaml").is_file()]
        return next((run for run in runs if run.status() != "done"), None)

    def check_free(self, overwrite: bool) -> None:
        """Refuses a folder that holds a run already, unless that one is to be overwritten."""
        if self.config.exists() and not overwrite:
            raise UserError(
                f"--out {self.path} holds a run already",
                why=f"it has {'finished' if self.status() == 'done' else 'not finished'}",
                hint=f"--resume {self.path}   or   --overwrite   or leave --out away: runs are numbered",
            )

    def status(self) -> str:
        """``running``, ``interrupted`` or ``done``."""
        return str(self.read_summary().get("status", "running"))

    def read_summary(self) -> dict[str, Any]:
        """What ``summary.json`` says; empty if there is none."""
        try:
            summary = json.loads(self.summary.read_text()) if self.summary.exists() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.summary} is damaged", why=str(error) or "it is not JSON") from error
        if not isinstance(summary, dict):
            raise UserError(f"{self.summary} is damaged", why="it is not what a run writes")
        return summary

    def write_summary(self, **facts: Any) -> None:  # noqa: ANN401
        """Adds ``facts`` to ``summary.json``."""
        merged = self.read_summary() | facts
        with replaced(self.summary) as aside:
            aside.write_text(json.dumps(merged, indent=2, default=str) + "\n")

    def write_origin(self, arguments: list[str]) -> None:
        """Writes down the command, or the call of Python, and the environment."""
        (self.path / "command.txt").write_text(f"{origin('pretrain', arguments)}\n")
        facts = {"python": platform.python_version(), "system": platform.platform(), **versions()}
        (self.path / "env.txt").write_text("\n".join(f"{name} {value}" for name, value in facts.items()) + "\n")

    def unwritable(self, error: OSError) -> MachineError:
        """What to tell if something of the run cannot be written."""
        return MachineError(
            f"{error.filename or self.path} cannot be written: {error.strerror}",
            why=f"{free_bytes(self.path) / 2**20:.0f} MiB are free there",
            hint=f"make room, then  {called('pretrain')} --resume {self.path}   (saved checkpoints are intact)",
        )

    def say(self, text: str, shown: str | None = None) -> None:
        """Prints a line and keeps it in ``log.txt``; a person who watches may see it as ``shown`` instead."""
        tqdm.write(shown if shown is not None and watched() else text)  # beside a progress bar, not into it
        sys.stdout.flush()
        with self.log.open("a") as file:
            file.write(text + "\n")

    def _clear(self) -> None:
        for name in ("images", "checkpoints", "export", "tensorboard", "debug"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        timing = self.path / "timing.csv"
        for file in (self.metrics, timing, self.summary, self.bad_files, self.log, self.config):
            file.unlink(missing_ok=True)


def named_run(option: str, number: int = 1) -> str:
    """What to type where a run is to be named: the newest under ``runs``, or how to begin one if there is none."""
    runs = sorted(Path("runs").glob("*/config.yaml"), key=lambda file: _number(file.parent))[-number:]
    named = (f"{option} {shlex.quote(str(file.parent))}".lstrip() for file in runs)
    return "   or   ".join(named) or f"begin one:  {called('pretrain')}"


def run_of(weights: str) -> Path | None:
    """The run that tells what weights are: those that name it, its export or one of its checkpoints."""
    given = Path(weights.removeprefix("local-dir:"))
    exported, saved = given.parts[-2:] == ("export", "backbone"), given.parts[-2:-1] == ("checkpoints",)
    home = given.parents[1] if exported or (saved and given.suffix == ".ckpt") else given
    return home if (home / "config.yaml").is_file() else None


def evaluation_folder(weights: str, out: str | None, name: str) -> Path:
    """Where an evaluation writes: ``out``, or inside the run that ``weights`` belong to, or the next ``runs/NNN-name``.

    A folder ``RUN/evaluation/NAME`` is replaced by a later evaluation of the same name: it is a function of the run.
    """
    given = Path(weights.removeprefix("local-dir:"))
    run = next((home for home in (given, *given.parents[:2]) if (home / "config.yaml").is_file()), None)
    try:
        if out is None and run is None:
            return _numbered(Path("runs"), name)
        folder = Path(out) if out else cast(Path, run) / "evaluation" / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("*.png"), folder / "metrics.json"):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{out or 'runs'} cannot be written: {error.strerror}", hint="--out another/folder") from error
    return folder


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("mim-suite", "torch", "torchvision", "timm", "lightning", "kornia", "numpy", "pillow", "jsonargparse")
    return {name: version(name) for name in names}


def git_commit() -> str | None:
    """Commit of the working copy this runs from, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _numbered(root: Path, name: str) -> Path:
    """Makes and returns ``root/NNN-name`` with the next free number; safe when several runs start at once."""
    root.mkdir(parents=True, exist_ok=True)
    number = max(map(_number, root.iterdir()), default=0) + 1
    while True:
        path = root / f"{number:03d}-{name}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _file_to_resume(file: Path) -> UserError:
    """What to do with a checkpoint that ``--resume`` names: it wants the run, whose newest good one it takes."""
    run = next((folder for folder in file.absolute().parents[:2] if (folder / "config.yaml").is_file()), None)
    start = f"--init {file}   to start a new run from these weights"
    return UserError(
        f"--resume {file} is a file, not a run",
        why=f"it belongs to {os.path.relpath(run)}" if run else "schedule and settings of its run are not beside it",
        hint=f"--resume {os.path.relpath(run)}   or   {start}" if run else start,
    )


def _number(path: Path) -> int:
    """Number of a run folder, 0 if it has none."""
    digits = re.match("[0-9]+", path.name)
    return int(digits[0]) if digits else 0


def quieten(rank: int) -> None:
    """Keeps Lightning's tips and hints off the screen; what a user can act on, we say ourselves."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    if rank != 0:
        warnings.filterwarnings("ignore", category=BadFileWarning)  # the first process names them
    warnings.showwarning = _show_warning
    threading.excepthook = _show_thread_error


def _show_thread_error(error: threading.ExceptHookArgs) -> None:
    """Says nothing of a full disk that stopped TensorBoard's thread: the run notices at the next file of its own."""
    if not (isinstance(error.exc_value, OSError) and error.exc_value.errno in UNWRITABLE):
        threading.__excepthook__(error)


def _show_warning(message: Warning | str, category: type[Warning], *rest: object, **more: object) -> None:
    head = "warning:" if issubclass(category, BadFileWarning) else f"warning: {category.__name__}:"
    tqdm.write(f"{paint(head, 'yellow')} {message}")
    sys.stdout.flush()

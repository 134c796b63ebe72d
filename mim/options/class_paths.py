"""What a setting may name as a class: our own building blocks, and those of packages that the user has named.

A config file is data: a class path in it leads nowhere else, importable or not. ``--plugin my_package`` is the one
door. It imports the package, which runs its code, and so is never opened by a file, not even by that of a run which
was trained with it.
"""

import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jsonargparse import set_parsing_settings
from jsonargparse._common import parsing_settings  # settings are the process's, and no public name takes them back

from mim.distributed.processes import process_rank
from mim.errors import UserError
from mim.options.yaml_files import settings_in

BUILDING_BLOCKS = ("mim.methods", "mim.masking", "mim.reduction", "mim.targets", "mim.data.views", "mim.encoder")
"""Where a class path may lead; saved settings of runs and of reductions name them, so they stay where they are."""

RUNS_CODE = "it imports the package, which runs its code"

_named: list[str] = []
"""Packages of the user that are in use."""


class PluginError(UserError):
    """Settings need a package that the user has not named in this call, or one that cannot be imported."""


@contextmanager
def known_class_paths() -> Iterator[None]:
    """Inside, parsers import classes from our building blocks and from the user's plugins, and from nowhere else.

    Afterwards jsonargparse is as it was: the program around us may have parsers of its own.
    """
    before = dict(parsing_settings)
    parsing_settings["import_path_verdicts"] = {}
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*BUILDING_BLOCKS, *_named])
    try:
        yield
    finally:
        parsing_settings.update(before)


@contextmanager
def plugins(names: Sequence[str]) -> Iterator[None]:
    """Imports packages, says so, and lets settings name their classes inside.

    A package may be installed, or lie in the folder in which the command was started.

    Raises:
        PluginError: if one cannot be imported.
    """
    here, known = os.getcwd(), list(_named)
    path = list(sys.path)
    if here not in sys.path:
        sys.path.append(here)  # last, so that nothing in this folder stands in for anything installed
    try:
        for name in dict.fromkeys(names):
            file = _import(name)
            if process_rank() == 0:
                print(f"  plugin  {name} imported, its code runs: {os.path.relpath(file)}", flush=True)
            _named.append(name)
        yield
    finally:
        _named[:] = known
        if here not in path and here in sys.path:
            sys.path.remove(here)


def plugins_in_use() -> list[str]:
    """Names of the packages inside of :func:`plugins`."""
    return list(_named)


def check_plugins(file: Path, option: str) -> None:
    """Refuses a YAML file that records plugins which were not named in this call; imports nothing.

    Raises:
        PluginError: that names them.
    """
    recorded = settings_in(file).get("plugin") or []
    recorded = [recorded] if isinstance(recorded, str) else recorded
    missing = [str(name) for name in recorded if name not in _named] if isinstance(recorded, list) else []
    if missing:
        raise PluginError(
            f"{option} {file} needs {', '.join(missing)}, which this call does not name",
            why="its settings name classes outside of this project, and no file may import them by itself",
            hint=f"--plugin {','.join(missing)}   ({RUNS_CODE})",
        )


def plugin_hint(class_path: str) -> str:
    """What to type to use a class of a package."""
    return f"--plugin {class_path.partition('.')[0]}   ({RUNS_CODE})"


def refused_class(text: str) -> str | None:
    """The class path that jsonargparse did not follow, if its error tells of one that a plugin could hold."""
    denied = re.search(r"Importing '([\w.]+)' is not allowed", text)
    foreign = denied and denied[1].partition(".")[0] not in sys.stdlib_module_names
    return denied[1] if denied and foreign else None


def _import(name: str) -> Path:
    if not all(part.isidentifier() for part in name.split(".")):
        stem = Path(name).with_suffix("").name
        hint = f"--plugin {stem}   in the folder that holds it" if stem.isidentifier() else "--plugin my_package"
        raise PluginError(f"--plugin {name} is not the name of a package", why="it is what import takes", hint=hint)
    try:
        module = importlib.import_module(name)
    except Exception as error:  # code of the user's may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        where = "" if missing else f" ({place.filename}, line {place.lineno})"
        raise PluginError(
            f"--plugin {name} cannot be imported",
            why=f"{type(error).__name__}: {error}{where}",
            hint="start in the folder that holds it, or pip install it" if missing else f"python -c 'import {name}'",
        ) from error
    return Path(getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [name]))))

"""What a config file may be before anybody parses it: small, flat, without references."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from mim.errors import UserError
from mim.options.class_paths import check_plugins
from mim.options.recipes import recipe_file
from mim.options.yaml_files import Loader, settings_in
from mim.program import called

MAX_BYTES = 1 << 18
"""256 KiB; recipes have two."""
MAX_DEPTH = 32
"""Levels of nesting; recipes have five."""


def with_config_files(args: Sequence[str]) -> list[str]:
    """The same ``--name=value`` arguments with the file of every recipe that ``--config`` names, after a look at it.

    Files come first, in their order: the parser lets what is later win, and an option wins wherever it stands.
    A few hundred bytes of aliases can stand for gigabytes of settings, and the parser would go through all of them.

    Raises:
        UserError: for a file that is not there, too large, too deep or refers to itself; the parser tells the rest.
    """
    files, options = [], []
    for arg in args:
        name, _, value = arg.partition("=")
        if name == "--config":
            file = recipe_file(value)
            check_config_file(file)
            files.append(f"{name}={file}")
        else:
            options.append(arg)
    return [*files, *options]


OLD_DATA = {"path", "views", "max_bad", "mean", "std", "licence"}
"""Settings of the data that a run wrote down before there was ``value_range``; recipes name some of them at most."""


def keeping_old_scale(args: Sequence[str]) -> list[str]:
    """The arguments, with ``per_file`` behind each config of a run that knew no other ``data.value_range``."""
    kept: list[str] = []
    for position, arg in enumerate(args):
        kept.append(arg)
        if arg.startswith("--config="):
            file = Path(arg.partition("=")[2])
        elif position and args[position - 1] == "--config":
            file = Path(arg)
        else:
            continue
        if file.is_file() and _of_an_old_run(file):
            kept.append("--data.value_range=per_file")
    return kept


def _of_an_old_run(path: Path) -> bool:
    data = settings_in(path).get("data")
    return isinstance(data, dict) and data.keys() >= OLD_DATA and "value_range" not in data


def check_config_file(path: Path, option: str = "--config") -> None:
    """Looks at one file; ``option`` is what named it. Raises as :func:`check_config_files`."""
    hint = f"{called('info')} configs   lists recipes to begin with"
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{option} {path}: {path.stat().st_size >> 10} KiB, more than {MAX_BYTES >> 10}", hint=hint)
    depth = 0
    try:
        for event in yaml.parse(path.read_bytes(), Loader=Loader):
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{option} {path}: *{event.anchor} is an alias", hint="write the values out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise UserError(f"{option} {path}: more than {MAX_DEPTH} levels", hint=hint)
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{option} {path} is not YAML", why=why, hint=hint) from error
    check_plugins(path, option)

"""How a run goes on: its saved settings, with what may change on top."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from mim.errors import UserError
from mim.options.recipes import CONFIGS, recipe_file
from mim.options.yaml_files import settings_in
from mim.run.config import absolute, changes, parse, parse_saved, save_config
from mim.run.folder import RunFolder

FREE_TO_CHANGE = (
    "trainer.",
    "data.num_workers",
    "data.max_bad",
    "log",
    "save_every",
    "eval_every",
    "pictures",
    "profile",
)
"""Settings that a resumed run may change without asking: they do not change what is computed."""


def resumed_arguments(run: RunFolder, args: Sequence[str]) -> list[str]:
    """The saved settings with this call's options on top; refuses what would change the function computed.

    A config file counts as options do; but beside ``--resume auto`` a recipe of the package is what a new run would
    have started from, and may have changed since this one began.
    """
    saved = f"--config={run.config}"
    files = [recipe_file(arg.removeprefix("--config=")) for arg in args if arg.startswith("--config=")]
    if "--resume=auto" in args:
        files = [file for file in files if CONFIGS not in file.resolve().parents]
    for file in files:
        _check_same_method(run, file)
    settled = ("--config=", "--out=", "--data.value_range=auto")  # the last was settled by the first start
    own = [f"--config={file}" for file in files]
    merged = [saved, *own, *(arg for arg in args if not arg.startswith(settled))]
    try:
        config = parse(merged)
    except UserError:
        parse_saved(run.config)  # if they are to blame, not what was added to them
        raise
    settled_range = parse_saved(run.config).data.value_range
    if config.data.value_range == "auto" != settled_range:  # as a file may say
        merged.append(f"--data.value_range={settled_range}")
        config = parse(merged)
    allowed = (*FREE_TO_CHANGE, *filter(None, config.allow_change.split(",")))
    changed = changes([saved], config)
    if "data.path" in changed and len(set(map(absolute, changed["data.path"]))) == 1:
        changed.pop("data.path")  # the same folder, named from another place
    differing = {
        name: values
        for name, values in changed.items()
        if not name.startswith(allowed) and not (name == "epochs" and values[1] > values[0])
    }
    if differing:
        rows = [f"         {name:<40} {old} -> {new}" for name, (old, new) in differing.items()]
        raise UserError(
            "\n".join([f"--resume {run.path}: {_counted(rows)} from the saved run", *rows]),
            why="resuming continues the same schedule and optimizer",
            hint=f"drop them,  or  --allow_change {','.join(differing)},  or start fresh:  --init {run.path}",
        )
    if "epochs" in changed:
        print(f"note: epochs {changed['epochs'][0]} -> {changed['epochs'][1]}: schedules are stretched", flush=True)
    return merged


def _check_same_method(run: RunFolder, file: Path) -> None:
    """Refuses a config of another method than that of the run."""
    own, other = (_method(settings_in(config)) for config in (run.config, file))
    if own and other and own != other:
        raise UserError(
            f"--resume {run.path} is a run of {own}, and --config {file} one of {other}",
            hint=f"leave --config out   or start a run of its own:  --out runs/{other.lower()}",
        )


def _method(settings: Mapping[str, Any]) -> str:
    """The class of a config's method, without its module; nothing if it names none."""
    model = settings.get("model")
    return str(model.get("class_path", "")).rpartition(".")[2] if isinstance(model, dict) else ""


def _counted(rows: Sequence[str]) -> str:
    return "1 setting differs" if len(rows) == 1 else f"{len(rows)} settings differ"


def check_number_of_images(run: RunFolder, images: int) -> None:
    """Refuses data that hold more or fewer images than when the run began: its order and length follow from them."""
    before = run.read_summary().get("images", images)
    if before != images:
        raise UserError(
            f"--resume {run.path}: the data hold {images:,} images, the run began with {before:,}",
            why="the order of the images and the length of the run follow from their number",
            hint=f"--resume {run.path} --allow_change data.path   or start fresh:  --init {run.path}",
        )


def remember_moved_data(run: RunFolder, config: Namespace) -> None:
    """Writes into the run's settings where its images are now, if the user has allowed that to change."""
    saved, path = parse_saved(run.config), absolute(config.data.path)
    if absolute(saved.data.path) != path:
        saved.data.path = path
        save_config(saved, run.config)

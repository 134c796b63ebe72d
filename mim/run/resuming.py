"""How a run goes on: its saved settings, with what may change on top."""

from collections.abc import Sequence

from jsonargparse import Namespace

from mim.errors import UserError
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
    """The saved settings with this call's options on top; refuses what would change the function computed."""
    saved = f"--config={run.config}"
    settled = ("--config=", "--out=", "--data.value_range=auto")  # the last was settled by the first start
    merged = [saved, *(arg for arg in args if not arg.startswith(settled))]
    try:
        config = parse(merged)
    except UserError:
        parse_saved(run.config)  # if they are to blame, not what was added to them
        raise
    allowed = (*FREE_TO_CHANGE, *filter(None, config.allow_change.split(",")))
    changed = changes(merged, config)
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

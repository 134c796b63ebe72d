"""What the options of a call name on this disk and in timm, looked at before anything heavy is imported."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mim.data.pixels import parse_bands, parse_range
from mim.data.places import OTHERWISE, check_folder_of_masks, check_place
from mim.distributed.processes import process_rank
from mim.errors import UserError
from mim.options.outputs import check_folder
from mim.options.timm_names import check_model, check_weights
from mim.program import called
from mim.run.folder import RunFolder


def check_pretraining(args: Sequence[str]) -> None:
    """Refuses images, weights, models and folders that are not there, and a folder that is in use.

    Args:
        args: dotted options, as :func:`mim.options.pretraining.translate` gives them.

    Raises:
        UserError: for the first of them.
    """
    given = dict(arg.removeprefix("--").partition("=")[::2] for arg in args)
    resumed = RunFolder.find(given["resume"], given.get("out")) if "resume" in given and process_rank() == 0 else None
    if resumed is not None:
        return  # its settings were good, and images may have moved: the run itself tells
    if "out" in given and process_rank() == 0:  # the first process makes the folder that the others find
        RunFolder(Path(given["out"])).check_free(given.get("overwrite") == "true")
        check_folder("--out", Path(given["out"]))
    check_trackers(given.get("log", "").strip("[]").split(","))
    parse_range(given.get("data.value_range", "auto"), given.get("data.log_values") == "true")
    parse_bands(given.get("data.bands"))
    for option in ("init", "continue"):
        if option in given:
            check_weights(given[option], f"--{option}")
    check_model(given.get("model.init_args.encoder.model", "test_vit"))
    if "data.path" in given:
        check_place(given["data.path"], label_column=given.get("data.label_column"))


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker whose package is not installed."""
    for name in filter(None, names):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--log {name}: {name} is not installed", hint=f"pip install mim-suite[{name}]")


def check_named(command: str, options: Mapping[str, Any]) -> None:
    """As :func:`check_pretraining`, for the options of another command."""
    if options.get("model"):
        check_model(options["model"])
    if options.get("weights"):
        check_weights(options["weights"])
    if command == "segment":
        check_folder_of_masks(options["data"])
    elif options.get("data"):
        otherwise = f"{called('make_shapes')} --out shapes   draws some" if command == "check_data" else OTHERWISE
        check_place(options["data"], otherwise, options.get("label_column"))

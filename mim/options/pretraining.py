"""The short options of ``pretrain``, and the recipe that a call starts from.

Short options are translated to the dotted ones of the full schema, which is nothing but the signatures of the classes
that a run is made of; ``--help_all`` shows it.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from mim.errors import UserError
from mim.options.config_file import check_config_file
from mim.options.grammar import Option, read
from mim.options.ranges import Count, Number, Positive, Processes, ProperShare, Seed, Share, Side, Threads, Whole
from mim.options.recipes import CONFIGS, method_names, recipe_file
from mim.program import called

BUILT_IN = ("builtin", "shapes")
_ENCODER = "model.init_args.encoder"

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16"]
"""Of what Lightning's trainer computes in, where weights and images stay float32; the last three are short names."""
Tracker = Literal["tensorboard", "wandb", "mlflow"]
"""Who keeps curves beside ``metrics.csv``."""

GROUPS: dict[str, dict[str, Option]] = {
    "What to train on": {
        "data": Option(
            "PATH",
            "folder, list.csv, 'name-{00..99}.tar' (or s3://, https://), builtin or shapes",
            "builtin",
            "data.path",
        ),
        "method": Option("NAME", "the recipe of a method; info configs lists them", "mae"),
        "model": Option("NAME", "any timm Vision Transformer", "vit_small_patch16_224", f"{_ENCODER}.model"),
        "init": Option("WEIGHTS", "start from a timm name, a folder, a run or a checkpoint file", target="init"),
        "continue": Option(
            "WEIGHTS", "go on from strong weights: heads first, then all of it, gently", target="continue"
        ),
        "lora": Option(
            "RANK",
            "rank of additions to attention, which alone learn (LoRA); needs --continue",
            "off",
            f"{_ENCODER}.lora",
            Count,
            example="8",
        ),
        "registers": Option(
            "N", "learned tokens beside the class token", "the model's own", f"{_ENCODER}.registers", Whole
        ),
        "img_size": Option(
            "N|H,W",
            "pixels per side that the model sees",
            "the model's",
            f"{_ENCODER}.img_size",
            Count | list[Count],
            "commas",
            "224",
        ),
        "patch_size": Option(
            "N", "pixels per side of a patch", "the model's", f"{_ENCODER}.patch_size", Count, example="16"
        ),
        "label_column": Option(
            "NAME", "column of a table, or level of folders, that holds labels", "found", "data.label_column"
        ),
        "windows": Option(
            "N", "cut larger images into windows of N pixels per side", "not cut", "data.windows", Side, example="512"
        ),
        "stride": Option("N", "pixels from one window to the next", "a window", "data.stride", Count),
        "in_chans": Option("N", "channels of the images", "the model's, 3", f"{_ENCODER}.in_chans", Count, "", "3"),
    },
    "Numbers in the files": {
        "value_range": Option(
            "LO,HI|auto",
            "numbers that become 0 and 1; auto measures them once for all files",
            "auto",
            "data.value_range",
        ),
        "clip": Option("", "keep values within that range", target="data.clip"),
        "log_values": Option(
            "", "scale logarithms of the numbers, which span many powers of ten", target="data.log_values"
        ),
        "bands": Option("A,B,...", "channels to read, counted from 1", "all", "data.bands"),
        "nodata": Option("X", "number that means 'not measured', besides NaN", "found", "data.nodata", Number),
    },
    "Training": {
        "epochs": Option("X", "passes over the images", "the recipe's", "epochs", Positive),
        "batch_size": Option(
            "N",
            "images per step over all devices; the learning rate follows",
            "the recipe's",
            "data.batch_size",
            Count,
        ),
        "blr": Option("X", "base learning rate, for 256 images", "the recipe's", "model.init_args.optim.blr", Positive),
        "mask_ratio": Option(
            "X", "share of patches that is hidden in a masked image", "the recipe's", "mask_ratio", ProperShare
        ),
        "seed": Option("N", "of everything random", "0", "seed", Seed),
    },
    "Machine": {
        "devices": Option(
            "N", "devices to train on", "all", "trainer.devices", Count | Literal["auto", -1] | list[Whole], "commas"
        ),
        "strategy": Option("ddp|fsdp", "fsdp: every device holds a share of the optimizer", "ddp", "trainer.strategy"),
        "precision": Option(
            "NAME",
            "32-true or bf16-mixed",
            "bf16-mixed where the GPU has it",
            "trainer.precision",
            Precision,
            "",
            "32-true",
        ),
        "accumulate": Option(
            "N", "micro-batches per step: same result, less memory", "1", "trainer.accumulate_grad_batches", Count
        ),
        "compile": Option("", "compile the transformer blocks", target="compile"),
        "threads": Option("N", "CPU threads of the training process", "torch's choice", "threads", Threads),
        "num_workers": Option("N", "loader processes", "one per core", "data.num_workers", Processes | Literal["auto"]),
        "max_bad": Option("X", "share of unreadable files that is tolerated", "0.01", "data.max_bad", Share),
    },
    "Looking on": {
        "eval_every": Option(
            "X", "epochs between probes and pictures", "10 over the run, 50 steps at least", "eval_every", Positive
        ),
        "profile": Option("N", "write a trace of N steps for a browser", "none", "profile", Count, example="5"),
        "save_every": Option("X", "epochs between checkpoints", "20 over the run", "save_every", Positive),
        "log": Option(
            "NAMES", "who keeps curves: tensorboard, wandb, mlflow", "tensorboard", "log", list[Tracker], "always"
        ),
        "log_every": Option("N", "steps between lines of metrics.csv", "10", "log_every", Count),
        "pool": Option(
            "mean|cls",
            "features that probes measure: of the patch tokens, or cls",
            "mean",
            "pool",
            Literal["mean", "cls"],
        ),
        "probe_images": Option("N", "most images that a probe learns from", "5000", "probe_images", Count),
        "pictures": Option("N", "images in a picture strip", "8", "pictures", Whole),
    },
    "Run": {
        "out": Option("DIR", "run folder", "runs/NNN-method-data", "out"),
        "resume": Option("RUN", "continue a run; auto: the newest unfinished one, or a new one", target="resume"),
        "overwrite": Option("", "replace the run that --out holds", target="overwrite"),
        "allow_change": Option("A,B", "settings that a resumed run may change", target="allow_change", lists="text"),
        "trust": Option("", "load an --init file although it can run code", target="trust"),
        "plugin": Option("PACKAGE", "import your own package, which runs its code", target="plugin"),
        "config": Option(
            "FILE", "settings in YAML, or a recipe's name; several merge left to right, options win", target="config"
        ),
        "print_config": Option("", "print all settings as YAML and stop", target="print_config"),
        "help_all": Option(
            "", "every other setting, as --model.init_args.decoder_depth 4; --model.help MAE", target="help_all"
        ),
        "debug": Option("", "show the traceback of an error"),
    },
}
"""The options of ``pretrain`` by heading: the one table that translates them."""

PRETRAIN = {name: option for options in GROUPS.values() for name, option in options.items()}
"""All of them by name."""

_CONTINUED = "continue-dinov3_vit_small"
_BARE = ("print_config", "help_all")


def translate(args: Sequence[str]) -> list[str]:
    """Turns short options into dotted ones, after the recipe that ``--method``, ``--config`` and ``--data`` imply."""
    if "--help_all" in args:  # what it is asked for may be the mistake beside it
        return ["--help_all"]
    given = read(args, PRETRAIN, dotted=True)
    names = dict(given)
    dotted = [
        f"--{PRETRAIN[name].target if name in PRETRAIN else name}={value}"
        for name, value in given
        if name not in PRETRAIN or PRETRAIN[name].target not in ("", *_BARE)
    ]
    dotted += [f"--{name}" for name in _BARE if names.get(name) == "true"]
    if names.get("resume") == "auto" and "method" in names:  # of the run that is going to be found, perhaps
        dotted.append(f"--method={names['method']}")
    return [*_recipe(names, [value for name, value in given if name == "config"]), *dotted]


def _recipe(names: Mapping[str, str], configs: Sequence[str]) -> list[str]:
    """What stands below all settings that are given: nothing if they are complete, or else a recipe of the method.

    A config with ``model:`` is complete, and so is a run that is resumed; ``auto`` may find none, and then starts.
    """
    method = names.get("method", "mae")
    _check_method(method)
    _check_continued(names)
    _check_scale(names)
    files = [recipe_file(config) for config in configs]
    resumed = names.get("resume", "auto") != "auto"
    if resumed:  # its own settings are complete, and whatever is given goes on top of them
        saved = Path(names["resume"], "config.yaml")
        files, configs = ([saved], [str(saved)]) if "method" in names and saved.is_file() else ([], [])
    settings = [_settings(file) for file in files]
    whole = [(name, content["model"]) for name, content in zip(configs, settings, strict=True) if "model" in content]
    if whole and "method" in names:
        check_same_method(method, *whole[-1])
    if whole or resumed:
        return []
    if "continue" in names:
        return _continued_recipe(method, names)
    named = next((found for content in reversed(settings) if (found := _path(content))), "builtin")
    data = names.get("data", names.get("data.path", named))
    own_model = "model" in names or f"{_ENCODER}.model" in names
    demo = data in BUILT_IN and not own_model  # the demo's model is small, on purpose
    return [f"--config={method}/{'demo' if demo else 'default'}"]


def no_weights_for_lora(rank: object) -> UserError:
    """Additions to random weights that stand still would learn next to nothing."""
    return UserError(
        f"--lora {rank}: the weights that it adds to stand still, and these would be random",
        hint=f"--continue vit_small_patch16_dinov3.lvd1689m --lora {rank}",
    )


def _check_scale(names: Mapping[str, str]) -> None:
    """Refuses what the scale of earlier versions has never looked at."""
    if names.get("value_range") == "per_file" and (
        unread := [name for name in ("clip", "bands", "nodata") if name in names]
    ):
        raise UserError(
            f"--{unread[0]} and --value_range per_file exclude each other",
            why="that scale of earlier versions reads every file as 8 bit by itself",
            hint="--value_range auto",
        )


def _check_continued(names: Mapping[str, str]) -> None:
    """Refuses a second place to start from, and none where there must be one."""
    if "lora" in names and names.keys().isdisjoint(("continue", "init", "config", "resume", f"{_ENCODER}.pretrained")):
        raise no_weights_for_lora(names["lora"])
    if "continue" not in names:
        return
    if "init" in names:
        raise UserError("--continue and --init both name weights to start from", hint="leave --init out")
    if names.get("resume", "auto") != "auto":
        raise UserError(
            "--continue starts a new run, --resume goes on with an old one", hint=f"--resume {names['resume']}"
        )


def _continued_recipe(method: str, names: Mapping[str, str]) -> list[str]:
    """The recipe of a method for good weights, with the model that these weights are of unless it is named."""
    recipe = CONFIGS / method / f"{_CONTINUED}.yaml"
    if not recipe.is_file():
        known = sorted(path.parent.name for path in CONFIGS.glob(f"*/{recipe.name}"))
        why = f"there is one for {', '.join(known)}"
        raise UserError(f"--continue: {method} has no recipe for it", why=why, hint=f"--method {known[0]}")
    config = [f"--config={method}/{_CONTINUED}"]
    if "model" in names or f"{_ENCODER}.model" in names:
        return config
    weights = names["continue"]
    folder = Path(weights.removeprefix("local-dir:"))
    if not folder.exists():
        name = weights if ":" in weights else weights.partition(".")[0]
        return [*config, f"--{_ENCODER}.model={name}"]
    homes = {home: told for home in (folder, folder / "export" / "backbone") if (told := _timm_config(home))}
    if not homes and (folder / "config.yaml").is_file():
        export = f"{called('export')} --run {folder}   writes what it has so far"
        raise UserError(f"--continue {weights}: this run has exported no model yet", hint=export)
    for home, told in homes.items():
        config.append(f"--{_ENCODER}.model=local-dir:{home}")
        if (
            isinstance(told.get("model_args"), dict) and "img_size" in told["model_args"]
        ):  # that of the recipe is another
            config.append(f"--{_ENCODER}.img_size={json.dumps(told['model_args']['img_size'])}")
        break
    return config


def _timm_config(folder: Path) -> dict[str, Any]:
    """What a folder tells timm of its model; nothing if it is one of transformers, or none."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and "architecture" in content else {}


def _check_method(method: str) -> None:
    if method not in (methods := method_names()):
        near = difflib.get_close_matches(method, methods, 1)
        why = None if near else f"there are {', '.join(methods)}"
        raise UserError(
            f"--method {method}: there is no such method", why=why, hint=f"--method {near[0] if near else 'mae'}"
        )


def _settings(file: Path) -> dict[str, Any]:
    """What a config file says, as far as it can be told without the schema."""
    check_config_file(file)
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError):  # the parser of the full schema tells what is wrong with a value
        return {}
    return content if isinstance(content, dict) else {}


def _path(settings: Mapping[str, Any]) -> str | None:
    data = settings.get("data")
    return str(data["path"]) if isinstance(data, dict) and "path" in data else None


def check_same_method(method: str, config: str, model: object) -> None:
    """Refuses a config that names another method than ``--method``."""
    own = _parts(model)
    known = {name: _parts(_settings(CONFIGS / name / "default.yaml")["model"]) for name in method_names()}
    same_class = [name for name, parts in known.items() if parts[0] == own[0]]
    same = [name for name in same_class if known[name][1] == own[1]] or same_class
    if (folder := config.partition("/")[0]) in same:  # a recipe says it itself, where methods share class and policy
        same = [folder]
    if method not in same:
        hint = f"--method {same[0]}" if same else "leave --method out"
        raise UserError(f"--method {method}: {config} is one of {same[0] if same else own[0]}", hint=hint)


def _parts(model: object) -> tuple[str, str]:
    """Names of the classes of a method and of its masking policy, as far as a config tells."""
    arguments = model.get("init_args") if isinstance(model, dict) else None
    return _class(model), _class(arguments.get("masking")) if isinstance(arguments, dict) else ""


def _class(part: object) -> str:
    path = part.get("class_path") if isinstance(part, dict) else part
    return str(path or "").rpartition(".")[2]

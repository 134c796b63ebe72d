"""The schema of a run: the signatures of its parts, read by jsonargparse. A config file is data; it imports nothing."""

import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace
from lightning import Trainer

from mim.atomic import replaced
from mim.data.objects import is_object
from mim.data.pixels import canonical_range
from mim.data.places import BUILT_IN
from mim.data.pretrain import PretrainData
from mim.data.remote import is_url
from mim.errors import UserError
from mim.methods import Method  # and with it every method, by class_path
from mim.options.class_paths import PluginError, known_class_paths, plugins_in_use
from mim.options.config_file import MAX_BYTES, keeping_old_scale, with_config_files
from mim.options.old_names import current_arguments
from mim.options.pretraining import Precision, Tracker
from mim.options.ranges import MANY, Count, Positive, ProperShare, Seed, Threads, Whole, fits, words
from mim.options.refusals import refusal

_HELP = "--help_all explains every option"

TRAINER_OPTIONS = {
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "deterministic",
    "detect_anomaly",
    "sync_batchnorm",
}
"""What of Lightning's Trainer a run may set; length, logging, checkpoints and resuming are the run's own business."""


@dataclass(frozen=True)
class RunOptions:
    """Length, seed and rhythm of a run.

    Args:
        epochs: passes over the images.
        seed: of everything random.
        save_every: epochs between checkpoints; 20 checkpoints over the run unless given.
        eval_every: epochs between probes and pictures; 10 times over the run, 50 steps apart at least, unless given.
        log_every: steps between lines of ``metrics.csv``.
        log: who keeps curves beside ``metrics.csv``.
        pictures: images in the picture strips.
        pool: what stands for an image in probes, in the export and in what evaluates it: the class token or the mean of
            the patch tokens.
        probe_images: most images that a probe learns from.
        compile: compile the transformer blocks with ``torch.compile``.
        threads: of the training process on a CPU; torch's choice unless given. Small models are faster with one thread
            and loader processes beside it. Sums depend on it in the last digit, so a resumed run must not change it.
        profile: steps, after the first three, to write a trace of; none unless given.
    """

    epochs: Positive = 100.0
    seed: Seed = 0
    save_every: Positive | None = None
    eval_every: Positive | None = None
    log_every: Count = 10
    log: list[Tracker] = field(default_factory=lambda: list[Tracker](["tensorboard"]))
    pictures: Whole = 8
    pool: Literal["mean", "cls"] = "mean"
    probe_images: Count = 5000
    compile: bool = False
    threads: Threads | None = None
    profile: Count | None = None


@cache
def schema() -> ArgumentParser:
    """The full schema of ``pretrain``; built once, for it takes as long as parsing a recipe."""
    parser = ArgumentParser(prog="pretrain", exit_on_error=False, add_help=False, description="Pretrain a ViT.")
    parser.add_argument("--help_all", action="help", help="Show this help and exit.")
    parser.add_argument("--config", action=ActionConfigFile, help="Settings in YAML.")
    parser.add_argument("--out", type=str | None, default=None, help="Run folder.")
    parser.add_argument("--resume", type=str | None, default=None, help="Run folder to continue, or 'auto'.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace the run that --out holds.")
    parser.add_argument("--allow_change", type=str, default="", help="Settings that a resumed run may change.")
    parser.add_argument("--plugin", type=list[str] | str | None, default=None, help="Packages of your own; recorded.")
    parser.add_argument("--init", type=str | None, default=None, help="Weights to start from.")
    parser.add_argument("--continue", type=str | None, default=None, help="Strong weights to go on from.")
    parser.add_argument("--mask_ratio", type=ProperShare | None, default=None, help="Share of patches that is hidden.")
    parser.add_argument("--trust", type=bool, default=False, help="Load an --init file although it can run code.")
    parser.add_class_arguments(RunOptions, None, as_group=True)
    parser.add_subclass_arguments(Method, "model", required=True)
    parser.add_class_arguments(PretrainData, "data")
    unused = set(_parameters(Trainer)) - TRAINER_OPTIONS
    parser.add_class_arguments(Trainer, "trainer", skip=unused, instantiate=False)
    return parser


def parse(args: Sequence[str]) -> Namespace:
    """Parses dotted options; a mistake becomes a :class:`UserError` with a suggestion."""
    args = with_config_files(args)
    config = _parsed(args)
    if config.mask_ratio is not None:
        config = _parsed([*args, *_mask_ratio(config, args)])
    config.plugin = plugins_in_use() or None
    return config


def _parsed(args: Sequence[str]) -> Namespace:
    with known_class_paths():
        try:
            parsed: Namespace = schema().parse_args(
                [_canonical(arg) for arg in current_arguments(keeping_old_scale(args))]
            )
        except ArgumentError as error:
            raise refusal(error, schema(), "--help_all") from error
    return parsed


def _mask_ratio(config: Namespace, args: Sequence[str]) -> list[str]:
    """What ``--mask_ratio`` means to the policy of this run: its settings of that kind, all set to the one number."""
    masking = "model.init_args.masking"
    path = getattr(config.get(masking), "class_path", None) or "the method"
    module, _, name = path.rpartition(".")
    settings: tuple[str, ...] = getattr(getattr(sys.modules.get(module), name, None), "ratio_settings", ())
    if not settings:
        hint = f"--help_all   and a setting of --{masking}.init_args"
        raise UserError(f"--mask_ratio {config.mask_ratio:g}: {name or path} has no such setting", hint=hint)
    names = [f"--{masking}.init_args.{setting}" for setting in settings]
    for name in names:
        if any(arg.startswith(f"{name}=") for arg in args):
            raise UserError(f"--mask_ratio and {name} are two words for one setting", hint="leave --mask_ratio out")
    return [f"{name}={config.mask_ratio}" for name in names]


def _canonical(arg: str) -> str:
    """The same option as ``config.yaml`` would say it, so that a repeated command is no change."""
    name, _, value = arg.partition("=")
    return f"{name}={canonical_range(value)}" if name == "--data.value_range" else arg


def parse_saved(file: Path) -> Namespace:
    """The settings that a run has written down; refuses a file that no run writes."""
    content = b""
    if file.is_file():
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    return _parsed_once(file, content, tuple(plugins_in_use())).clone()


@lru_cache(maxsize=16)
def _parsed_once(file: Path, content: bytes, plugins: tuple[str, ...]) -> Namespace:
    """A command looks into the settings of its run several times; the schema takes longer than the look."""
    try:
        return parse([f"--config={file}"])
    except PluginError:
        raise
    except UserError as error:
        hint = "another run, or a .ckpt file of this one with --model NAME"
        raise UserError(f"{file} is not what a run writes", why=error.error, hint=hint) from error


def instantiate(config: Namespace) -> Namespace:
    """Builds what a parsed config describes; what a constructor refuses becomes a :class:`UserError`."""
    _refuse_lists(config.model)
    try:
        with known_class_paths():
            objects: Namespace = schema().instantiate(config)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:  # the latter for models beyond all memory
        cause: BaseException = error
        # jsonargparse wraps it in a description of the types it has tried; a UserError has told what is below it.
        while cause.__cause__ is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        why = "a list stands where named settings belong" if "must be a mapping" in str(cause) else None
        raise UserError(str(cause)[:300] if not why else "the config has a wrong shape", why=why, hint=_HELP) from error
    return objects


def _refuse_lists(model: Namespace) -> None:
    """Refuses a list where a method takes named settings: jsonargparse would leave it and take the defaults."""
    module, _, name = model.class_path.rpartition(".")
    hints = get_type_hints(getattr(sys.modules[module], name).__init__)
    for setting, kind in hints.items():
        if is_dataclass(kind) and isinstance(model.init_args.get(setting), list):
            why = "a list stands where named settings belong"
            raise UserError(f"--model.init_args.{setting} has a wrong shape", why=why, hint=_HELP)


def run_options(config: Namespace) -> RunOptions:
    """The run's own options out of a parsed config; Lightning's, which it does not look at itself, are looked at."""
    names = ("accumulate_grad_batches", "gradient_clip_val", "precision")
    parts, norm, precision = (config.trainer.get(name) for name in names)
    if parts is not None and not 0 < parts < MANY:
        raise UserError(f"--accumulate {parts}: one micro-batch per step at least", hint="--accumulate 1")
    if norm is not None and not norm >= 0:
        raise UserError(f"--trainer.gradient_clip_val {norm} is below 0", hint="--trainer.gradient_clip_val 1.0")
    if precision is not None and not fits(Precision, str(precision)):
        raise UserError(
            f"--precision {precision}: weights and images stay float32 here",
            why=f"it is {words(Precision)}",
            hint="--precision bf16-mixed   computes in half precision",
        )
    return RunOptions(**{option.name: config[option.name] for option in fields(RunOptions)})


_FOLDER = "local-dir:"

SESSION = ("config", "out", "resume", "overwrite", "allow_change", "mask_ratio")
"""Options of one call of the command, not settings of the run."""
_KEPT_APART = (*SESSION, "plugin")
"""Also what is written down for people: where the classes of the settings come from."""


def flatten(config: Namespace) -> dict[str, Any]:
    """Every setting of the run under its dotted name."""
    return {name: value for name, value in vars(config.as_flat()).items() if name.split(".")[0] not in _KEPT_APART}


def save_config(config: Namespace, path: Path) -> None:
    """Writes every setting, resolved, so that ``--config`` takes it back."""
    kept = config.clone()
    for name in SESSION if config.plugin else _KEPT_APART:
        kept.pop(name, None)
    header = "# Every setting of this run; feed it back with --config.\n"
    with known_class_paths(), replaced(path) as aside:  # a run is a folder with this file in it
        aside.write_text(header + schema().dump(kept, skip_none=False, skip_validation=True))


def absolute(path: str) -> str:
    """A path, or pattern of paths, for any working directory; URLs, names of built-in images and of objects stay."""
    return path if path in BUILT_IN or is_object(path) or is_url(path) else os.path.abspath(os.path.expanduser(path))


def with_absolute_paths(config: Namespace) -> Namespace:
    """The same settings for any working directory: images, weights to start from and models in folders."""
    kept = config.clone()
    kept.data.path = absolute(kept.data.path)
    for option in ("init", "continue"):
        if kept[option] and Path(kept[option].removeprefix(_FOLDER)).exists():
            kept[option] = absolute(kept[option].removeprefix(_FOLDER))
    arguments = kept.model.init_args
    target = arguments.get("target")
    for part in (arguments.encoder, target.get("init_args") if target else None):
        if part and str(part.get("model") or "").startswith(_FOLDER):
            part.model = _FOLDER + absolute(part.model.removeprefix(_FOLDER))
        if part and Path(str(part.get("tokenizer") or "")).is_file():
            part.tokenizer = absolute(part.tokenizer)
    return kept


def changes(args: Sequence[str], parsed: Namespace) -> dict[str, tuple[Any, Any]]:
    """Settings whose value differs from the config files among ``args``: name to (in the files, now).

    Args:
        args: of the call.
        parsed: what they say.
    """
    files = [arg for arg in args if arg.startswith("--config")]
    before, now = flatten(parse(files)), flatten(parsed)
    names = [*now, *(name for name in before if name not in now)]
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}


def _parameters(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name != "self"]

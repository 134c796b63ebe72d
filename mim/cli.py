"""The thin front of the command line: help and typing mistakes are answered before torch is imported.

Short options are translated to the dotted ones of the full schema, which is nothing but the signatures of the classes
that a run is made of; ``--help_all`` shows it.
"""

import difflib
import errno
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mim import __version__
from mim.distributed.processes import INTERRUPTED, leave_group, leaving_on_signals, let_the_first_end, process_rank
from mim.errors import MACHINE_ERRORS, StoppedError, UserError

if TYPE_CHECKING:  # even this parser takes a moment to import: help and typing mistakes come first
    from jsonargparse import ArgumentParser

CONFIGS = Path(__file__).parents[1] / "configs"
BUILT_IN = ("builtin", "shapes")


class Option(NamedTuple):
    """A short option.

    Args:
        target: its name in the full schema, without dashes.
        value: how its value is written in the help; empty for a switch.
        text: one line of help, with the default in brackets.
    """

    target: str
    value: str
    text: str


_ENCODER = "model.init_args.encoder"
PRETRAIN: dict[str, Option] = {
    "data": Option("data.path", "PATH", "folder, list.csv, 'train-{0000..0099}.tar', builtin or shapes   [builtin]"),
    "method": Option("", "NAME", "recipe to start from: a folder in configs/   [mae]"),
    "model": Option(f"{_ENCODER}.model", "NAME", "any timm Vision Transformer   [vit_small_patch16_224]"),
    "epochs": Option("epochs", "N", "passes over the images"),
    "batch_size": Option("data.batch_size", "N", "images per step over all devices; the learning rate follows"),
    "out": Option("out", "DIR", "run folder   [runs/NNN-method-data]"),
    "resume": Option("resume", "RUN", "continue a run; 'auto' takes the newest unfinished one, or starts"),
    "init": Option("init", "WEIGHTS", "start from a timm name, a folder, a run or a checkpoint file"),
    "config": Option("config", "FILE", "settings in YAML; several merge left to right, options win"),
    "img_size": Option(f"{_ENCODER}.img_size", "N", "pixels per side that the model sees"),
    "patch_size": Option(f"{_ENCODER}.patch_size", "N", "pixels per side of a patch"),
    "in_chans": Option(f"{_ENCODER}.in_chans", "N", "channels of the images   [the model's, 3]"),
    "value_range": Option(
        "data.value_range", "LO,HI", "numbers in the files that become 0 and 1   [auto: measured once]"
    ),
    "clip": Option("data.clip", "", "keep values within that range"),
    "bands": Option("data.bands", "4,3,2", "channels of the files to read, counted from 1   [all]"),
    "nodata": Option("data.nodata", "V", "number that means 'not measured', besides NaN"),
    "mask_ratio": Option("model.init_args.masking.init_args.ratio", "R", "share of patches that is hidden"),
    "blr": Option("model.init_args.optim.blr", "LR", "base learning rate, for 256 images"),
    "seed": Option("seed", "N", "of everything random   [0]"),
    "accumulate": Option("trainer.accumulate_grad_batches", "N", "micro-batches per step: same result, less memory"),
    "devices": Option("trainer.devices", "N", "devices to train on   [all]"),
    "strategy": Option("trainer.strategy", "S", "ddp, or fsdp: every device holds a share of the optimizer   [ddp]"),
    "precision": Option("trainer.precision", "P", "32-true or bf16-mixed   [bf16-mixed where the GPU has it]"),
    "compile": Option("compile", "", "compile the transformer blocks"),
    "threads": Option("threads", "N", "CPU threads of the training process   [torch's choice]"),
    "num_workers": Option("data.num_workers", "N", "loader processes   [one per core]"),
    "max_bad": Option("data.max_bad", "SHARE", "share of unreadable files that is tolerated   [0.01]"),
    "save_every": Option("save_every", "N", "epochs between checkpoints   [20 over the run]"),
    "eval_every": Option("eval_every", "N", "epochs between probes and pictures   [10 over the run]"),
    "pictures": Option("pictures", "N", "images in a picture strip   [8]"),
    "pool": Option("pool", "P", "what stands for an image: mean of the patch tokens, or cls   [mean]"),
    "probe_images": Option("probe_images", "N", "most images that a probe learns from   [5000]"),
    "log_every": Option("log_every", "N", "steps between lines of metrics.csv   [10]"),
    "overwrite": Option("overwrite", "", "replace the run that --out holds"),
    "allow_change": Option("allow_change", "A,B", "settings that a resumed run may change"),
    "trust": Option("trust", "", "load an --init file although it can run code"),
    "print_config": Option("print_config", "", "print all settings as YAML and stop"),
    "help_all": Option("help_all", "", "every option of the full schema; also --model.help MAE"),
    "debug": Option("", "", "show the traceback of an error"),
}
"""The short options of ``pretrain``: the one table that translates them."""

COMMANDS = {
    "pretrain": "pretrain a Vision Transformer on images without labels",
    "knn": "classify images by their nearest neighbours in feature space",
    "linear_probe": "train a linear or attentive classifier on frozen features",
    "finetune": "train a whole encoder with labels",
    "segment": "semantic segmentation: linear, k-NN or UPerNet head, frozen or fine-tuned",
    "visualize": "draw what a model sees, which tokens a reduction leaves, or what masking policies hide",
    "compare": "put several runs side by side, or train them first",
    "export": "write a run's backbone as a timm folder",
    "check_data": "look at a data set before training on it",
    "make_shapes": "write the generated shapes as folders of images and masks",
    "benchmark": "measure speed and memory of a training step and of the loader",
    "benchmark_reduction": "measure what token reductions save at inference",
    "pareto": "draw accuracy over speed of token reductions that need no training",
    "pareto_finetuned": "draw accuracy over speed of what was fine-tuned with token reductions",
    "info": "list methods, models, configs, or what a run holds",
}

RESUMABLE = {"pretrain", "finetune", "segment"}
"""Commands that a signal interrupts with status 75 at any moment."""


def main(command: str | None = None, args: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    0 done, 2 a mistake of the user, 3 numbers that are not finite, 4 a failure of the machine, 75 interrupted and
    resumable.
    """
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if command is None:
        if not args or args[0] in ("-h", "--help"):
            print(_commands_help())
            return 0
        command = args.pop(0).replace("-", "_")
    with leaving_on_signals() if command in RESUMABLE else nullcontext():
        status = _answered(command, args, debug)
        if status != 0:
            let_the_first_end()
        return status


def _answered(command: str, args: list[str], debug: bool) -> int:
    """Runs a command; mistakes, and failures of the machine, are told in three lines."""
    try:
        return _dispatch(command, args)
    except UserError as error:
        if debug:
            traceback.print_exc()
        if process_rank() == 0 or error.alone:
            print(error, file=sys.stderr, flush=True)
        return error.status
    except StoppedError:
        print("stopped by a signal, saved; go on with  --resume true", flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MACHINE_ERRORS as error:
        from mim.run.failures import as_machine_error

        if (failure := as_machine_error(error)) is None or debug:
            raise
        print(failure, file=sys.stderr, flush=True)
        return failure.status
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG or debug:
            raise
        print(_too_long(args), file=sys.stderr)
        return 2
    finally:
        leave_group()


def _too_long(args: Sequence[str]) -> UserError:
    """The option whose value no disk takes as a name."""
    longest = max(range(len(args)), key=lambda place: len(args[place]))
    option, equals, value = args[longest].partition("=")
    option, value = (option, value) if equals else (args[longest - 1], args[longest])
    return UserError(
        f"{option} {value[:60]}... cannot be opened",
        why=f"a name of {len(value):,} characters",
        hint=f"{option} with a shorter path",
    )


def translate(args: Sequence[str]) -> list[str]:
    """Turns short options into dotted ones, after the recipe that ``--method`` and ``--data`` imply."""
    given = list(_pairs(args))
    names = dict(given)
    targets = [(PRETRAIN[name].target if name in PRETRAIN else name, value) for name, value in given]
    dotted = [f"--{target}={value}" for target, value in targets if target not in ("", "print_config", "help_all")]
    dotted += [f"--{name}" for name in ("print_config", "help_all") if name in names]
    if "config" in names or names.get("resume", "auto") != "auto":  # auto may find nothing, and then starts
        return dotted
    return [*_recipe(names), *dotted]


def _pairs(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of options; refuses unknown short names and missing values."""
    rest = list(args)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise UserError(f"{argument} stands alone", why="options begin with two dashes", hint="--data PATH")
        name, equals, value = argument[2:].partition("=")
        name = name if "." in name else name.replace("-", "_")
        if "." not in name and name not in PRETRAIN:
            near = difflib.get_close_matches(name, PRETRAIN, 1)
            raise UserError(f"there is no option --{name}", hint=f"did you mean --{near[0]}?" if near else "--help")
        switch = name in PRETRAIN and not PRETRAIN[name].value
        if not equals and rest and not rest[0].startswith("--") and not (switch and rest[0] not in ("true", "false")):
            equals, value = "=", rest.pop(0)
        if not equals and not switch:
            form = PRETRAIN[name].value if name in PRETRAIN else "VALUE"
            raise UserError(f"--{name} needs a value", hint=f"--{name} {form}")
        yield name, value if equals else "true"


def _recipe(names: dict[str, str]) -> list[str]:
    """The config of the method: its demo for the built-in images, its default for one's own images or model."""
    method = names.get("method", "mae")
    methods = sorted(folder.name for folder in CONFIGS.iterdir() if (folder / "default.yaml").is_file())
    if method not in methods:
        near = difflib.get_close_matches(method, methods, 1) or [" | ".join(methods)]
        raise UserError(f"--method {method}: there is no such method", hint=f"--method {near[0]}")
    demo = names.get("data", "builtin") in BUILT_IN and "model" not in names  # the demo's model is small, on purpose
    return [f"--config={os.path.relpath(CONFIGS / method / ('demo.yaml' if demo else 'default.yaml'))}"]


def _dispatch(command: str, args: list[str]) -> int:
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        raise UserError(f"there is no command {command}", hint=near[0] if near else " | ".join(COMMANDS))
    if command == "pretrain":
        if {"-h", "--help"} & set(args):
            print(_pretrain_help())
            return 0
        args = translate(args)
    module = importlib.import_module(f"mim.commands.{command}")
    if command == "pretrain":
        try:
            status: int = module.main(args)
        except UserError as error:
            raise _in_short(error) from error
        return status
    if command == "info" and args and not args[0].startswith("-"):  # `info models "vit_small*"`
        args = [f"--{name}={value}" for name, value in zip(("what", "name"), args, strict=False)]
    _call(module.run, command, args)
    return 0


def _in_short(error: UserError) -> UserError:
    """The same mistake under the option's short name, if it has one."""
    for name, option in PRETRAIN.items():
        for target in (option.target, option.target.replace("init_args.", "")):  # the parser itself leaves it out
            if f"--{target} " in error.error:
                error = error.about(f"--{name}", instead_of=f"--{target}")
    return error


def _call(run: Callable[..., None], command: str, args: list[str]) -> None:
    """Runs a command whose options are the arguments of one function."""
    from jsonargparse import ArgumentError

    from mim.options.config_file import check_config_files
    from mim.options.refusals import refusal

    check_config_files(args)
    parser = function_parser(run, command)
    try:
        options = parser.parse_args(args).as_dict()
    except ArgumentError as error:
        raise refusal(error, parser, f"python tools/{command}.py --help") from error
    for name, value in options.items():
        if value in ([], ()):
            raise UserError(f"--{name} is empty", why="it is a list of one or more", hint=f"leave --{name} out")
    grouped = {
        name: cls(**{field.name: options.pop(field.name) for field in fields(cls)})
        for name, cls in _option_groups(run).items()
    }
    if "config" not in inspect.signature(run).parameters:
        options.pop("config")
    run(**grouped, **options)


def function_parser(run: Callable[..., None], command: str) -> "ArgumentParser":
    """The options of a command: the arguments of its function, and the fields of those that are dataclasses."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog=f"python tools/{command}.py", description=COMMANDS[command], exit_on_error=False)
    if "config" not in inspect.signature(run).parameters:
        parser.add_argument("--config", action=ActionConfigFile, help="Settings in YAML; options win.")
    groups = _option_groups(run)
    for cls in groups.values():
        parser.add_class_arguments(cls, None, as_group=False)
    parser.add_function_arguments(run, as_group=False, skip=set(groups))
    return parser


def _option_groups(run: Callable[..., None]) -> dict[str, Any]:
    """Arguments of a command that stand for several options each."""
    arguments = inspect.signature(run).parameters.items()
    return {name: argument.annotation for name, argument in arguments if is_dataclass(argument.annotation)}


def _pretrain_help() -> str:
    rows = [(f"--{name} {option.value}".rstrip(), option.text) for name, option in PRETRAIN.items()]
    return "\n".join(
        [
            f"mim {__version__}: {COMMANDS['pretrain']}",
            "",
            "  python tools/pretrain.py                          built-in photos, under two minutes on two CPU cores",
            "  python tools/pretrain.py --data photos            your own images",
            "",
            *(f"  {option:<22}{text}" for option, text in rows),
            "",
            "Dotted options reach every other setting: --model.init_args.decoder_depth 4   (--help_all lists them)",
        ]
    )


def _commands_help() -> str:
    rows = [f"  {name:<20}{text}" for name, text in COMMANDS.items()]
    return "\n".join([f"mim {__version__}: python -m mim COMMAND [--help]   or   python tools/COMMAND.py", "", *rows])

"""The thin front of the command line: help and typing mistakes are answered before torch is imported."""

import difflib
import errno
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mim import __version__
from mim.distributed.processes import INTERRUPTED, leave_group, leaving_on_signals, let_the_first_end, process_rank
from mim.errors import MACHINE_ERRORS, StoppedError, UserError
from mim.options.grammar import Option, UnknownOptionError, read
from mim.options.help import page
from mim.options.pretraining import GROUPS, PRETRAIN, translate
from mim.options.signatures import Groups, flat, option_groups, options_of
from mim.program import called, typed
from mim.terminal import Colour, paint

if TYPE_CHECKING:  # even this parser takes a moment to import: help and typing mistakes come first
    from jsonargparse import ArgumentParser

COMMANDS = {
    "pretrain": "pretrain a Vision Transformer on images without labels",
    "knn": "classify images by their nearest neighbours in feature space",
    "linear_probe": "train a linear or attentive classifier on frozen features",
    "finetune": "train a whole encoder with labels",
    "segment": "semantic segmentation: linear, k-NN or UPerNet head, frozen or fine-tuned",
    "visualize": "draw what a model sees, which tokens a reduction leaves, or what masking policies hide",
    "compare": "put several runs side by side, or train them first",
    "export": "write a run's backbone as a timm folder",
    "features": "write class and patch features of images to disk",
    "check_data": "look at a data set before training on it",
    "make_shapes": "write the generated shapes as folders of images and masks",
    "tokens": "fit a tokenizer to images, or keep images as its tokens",
    "sample": "draw images with a run that predicts tokens, or fill in parts of given ones",
    "benchmark": "measure speed and memory of a training step and of the loader",
    "benchmark_reduction": "measure what token reductions save at inference",
    "pareto": "draw accuracy over speed of token reductions that need no training",
    "pareto_finetuned": "draw accuracy over speed of what was fine-tuned with token reductions",
    "info": "list methods, models, configs, or what a run holds",
}

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "pretrain": (("", "built-in photos, 2 to 3 minutes on two cores"), ("--data photos", "your own images")),
    "knn": (
        ("--weights runs/001-mae-photos --data labelled", "a run"),
        ("--weights vit_small_patch16_224", "a timm name"),
    ),
    "linear_probe": (
        ("--weights runs/001-mae-photos --data labelled", ""),
        ("--weights runs/001-mae-photos --head attentive --lrs 0.001,0.01", ""),
    ),
    "finetune": (
        ("--weights runs/001-mae-photos --data labelled --epochs 50", ""),
        ("--weights runs/001-mae-photos --config evaluation/finetune-demo", "a recipe"),
    ),
    "segment": (
        ("--weights runs/001-mae-photos --data my_masks", "a linear head"),
        ("--weights runs/001-mae-photos --head upernet --finetune", "all of it"),
    ),
    "visualize": (
        ("--weights runs/001-mae-photos --reduction tome:8", "which tokens are left"),
        ("--weights runs/001-mae-photos --policy all", "what masks hide"),
    ),
    "compare": (
        ("--runs runs/001-mae-photos,runs/002-hpm-photos", "runs that there are"),
        ("--methods mae,hpm --data photos --batch_size 64", "trains them first"),
    ),
    "export": (
        ("--run runs/001-mae-photos", "a timm folder"),
        ("--run runs/001-mae-photos --to onnx --out photos.onnx", "a graph"),
    ),
    "check_data": (
        ("--data photos", "sizes, colours, bad files"),
        ("--data photos --fix good.csv", "and a list of the good ones"),
    ),
    "features": (
        ("--weights runs/001-mae-photos --data photos", ""),
        ("--weights runs/001-mae-photos --data photos --patch false", ""),
    ),
    "make_shapes": (("--out shapes", ""), ("--out shapes --train 4096 --size 96", "")),
    "tokens": (
        ("fit --data photos --out photos.safetensors", "a codebook"),
        ("encode --data photos --tokenizer photos.safetensors", "a folder for --data"),
    ),
    "sample": (
        ("--run runs/001-maskgit-photos", "out of nothing"),
        ("--run runs/001-maskgit-photos --hide middle", "what may stand there"),
    ),
    "benchmark": (
        ("--config mae/vit_base_patch16_224 --against plain", "a step"),
        ("--config ibot/demo --data photos", "and its loader"),
    ),
    "benchmark_reduction": (
        ("--reduction tome,evit --shares 0.75,0.5", ""),
        ("--model vit_large_patch16_224 --reduction all", ""),
    ),
    "pareto": (
        ("--weights runs/001-mae-photos --data labelled", ""),
        ("--weights runs/001-mae-builtin --masks builtin", ""),
    ),
    "pareto_finetuned": (
        ("--finetuned runs/001-mae-photos", ""),
        ("--finetuned runs/001-mae-photos --device cpu --threads 1", ""),
    ),
    "info": (("configs", "the recipes that --config takes"), ('models "vit_small*"', "timm models")),
}
"""Two calls of each command, with a remark."""

EVERY = {
    "config": Option("FILE", "YAML, or a recipe's name; options win"),
    "plugin": Option("PACKAGE", "import your own; its code runs"),
    "print_config": Option("", "settings as YAML"),
    "help_all": Option("", "all about each option"),
    "debug": Option("", "tracebacks"),
}
"""What every command takes."""

WITHOUT_RUNS = {"check_data", "make_shapes", "info", "tokens"}
"""Commands that build nothing from settings, and so take no ``--plugin``."""

POSITIONAL = {"info": ("what", "name"), "tokens": ("what",)}
"""Options whose names may be left out, as in ``info models "vit_small*"`` and ``tokens fit``."""

OF_ONE_RUN = {"method", "seed", "resume", "overwrite"}
"""Options of pretraining that belong to a single run, not to the several that are compared."""

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
    if command is None and (script := Path(sys.argv[0]).stem).startswith("mim-"):
        command = script.removeprefix("mim-").removesuffix("-script").replace("-", "_")
    if command is None:
        if not args or args[0] in ("-h", "--help"):
            print(_commands_help())
            return 0
        command = args.pop(0).replace("-", "_")
    with leaving_on_signals() if command in RESUMABLE else nullcontext():
        with typed(command, args):
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
            _tell(error)
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
        _tell(failure)
        return failure.status
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG or debug:
            raise
        print(_too_long(args), file=sys.stderr)
        return 2
    finally:
        leave_group()


def _tell(error: UserError) -> None:
    """Prints its three lines; whoever watches sees their heads in colours."""
    text = str(error)
    for head, colour in HEADS.items():
        text = re.sub(f"^{head}", paint(head, colour, sys.stderr), text, flags=re.MULTILINE)
    print(text, file=sys.stderr, flush=True)


HEADS: dict[str, Colour] = {"error:": "red", "why:": "dim", "try:": "green"}


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


def _dispatch(command: str, args: list[str]) -> int:
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        why = None if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {command}", why=why, hint=called(near[0] if near else "pretrain"))
    if {"-h", "--help"} & set(args):
        print(help_page(command))
        return 0
    names, args = _plugins(args) if command not in WITHOUT_RUNS else ([], args)
    if not names:
        return _carried_out(command, args)
    from mim.options.class_paths import plugins

    with plugins(names):
        return _carried_out(command, args)


def _plugins(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The packages that ``--plugin`` names, and the other arguments."""
    names, others, rest = list[str](), list[str](), list(args)
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        if option != "--plugin":
            others.append(argument)
            continue
        value = value if equals or not rest or rest[0].startswith("--") else rest.pop(0)
        if not value:
            raise UserError("--plugin needs a value", hint="--plugin my_package")
        names += [name.strip() for name in value.split(",")]
    return names, others


def _carried_out(command: str, args: list[str]) -> int:
    try:
        return _told(command, args)
    except UnknownOptionError as error:
        raise _of_another(error, command) from None


def _told(command: str, args: list[str]) -> int:
    if command == "pretrain":
        from mim.run.names import check_pretraining

        args = translate(args)
        try:
            check_pretraining(args)
            status: int = importlib.import_module("mim.commands.pretrain").main(args)
        except UserError as error:
            raise in_short(error) from error
        return status
    if args and not args[0].startswith("-"):
        named = [f"--{name}={value}" for name, value in zip(POSITIONAL.get(command, ()), args, strict=False)]
        args = named + args[len(named) :]
    call(importlib.import_module(f"mim.commands.{command}").run, command, args)
    return 0


def _of_another(error: UnknownOptionError, command: str) -> UserError:
    """The same mistake; an option of other commands is told to be one of theirs."""
    owners = [name for name in COMMANDS if name != command and error.option in _options_of(name)]
    if not owners or error.near:
        return error
    nearest = difflib.get_close_matches(command, owners, 1, cutoff=0)[0]
    why = f"it is an option of {', '.join(owners)}"
    return UserError(error.error, why=why, hint=f"{called(nearest)} --help")


def _options_of(command: str) -> Mapping[str, Option]:
    if command == "pretrain":
        return PRETRAIN
    return flat(_groups(importlib.import_module(f"mim.commands.{command}").run))


def in_short(error: UserError) -> UserError:
    """The same mistake under the option's short name, if it has one."""
    for name, option in PRETRAIN.items():
        if not option.target:
            continue
        for target in (option.target, option.target.replace("init_args.", "")):  # the parser itself leaves it out
            if f"--{target} " in error.error:
                error = error.about(f"--{name}", instead_of=f"--{target}")
    return error


def call(run: Callable[..., Any], command: str, args: list[str]) -> Any:  # noqa: ANN401 - what the command gives
    """Runs a command whose options are the arguments of one function."""
    groups = _groups(run)
    if "--help_all" in args:
        print(help_page(command, whole=True))
        return None
    passed_on = _passed_on(run, flat(groups))
    given = read(args, {**flat(groups), **passed_on})
    arguments = [
        f"--{name}" if name == "print_config" else f"--{name}={value}" for name, value in given if name not in passed_on
    ]
    from jsonargparse import ArgumentError

    from mim.options.config_file import with_config_files
    from mim.options.refusals import refusal

    parser = function_parser(run, command)
    try:
        options = parser.parse_args(with_config_files(arguments)).as_dict()
    except ArgumentError as error:
        raise refusal(error, parser, f"{called(command)} --help") from error
    for name, value in options.items():
        if value in ([], ()):
            raise UserError(f"--{name} is empty", why="it is a list of one or more", hint=f"leave --{name} out")
    from mim.run.names import check_named

    check_named(command, options)
    grouped = {
        name: cls(**{field.name: options.pop(field.name) for field in fields(cls)})
        for name, cls in option_groups(run).items()
    }
    if "config" not in inspect.signature(run).parameters:
        options.pop("config")
    options.pop("plugin", None)  # taken before anything was parsed; one that a file records has been checked
    return run(**grouped, **options, **{name: value for name, value in given if name in passed_on})


def _passed_on(run: Callable[..., Any], own: Mapping[str, Option]) -> dict[str, Option]:
    """Options of pretraining that a command hands on to several runs."""
    if not any(argument.kind == argument.VAR_KEYWORD for argument in inspect.signature(run).parameters.values()):
        return {}
    return {name: option for name, option in PRETRAIN.items() if name not in own and name not in OF_ONE_RUN}


def _groups(run: Callable[..., Any]) -> Groups:
    """The options of a command by heading, and those that every command has."""
    groups = options_of(run)
    own = flat(groups)
    every = EVERY.keys() - own.keys() - ({"print_config"} if "config" in own else set())
    every -= {"plugin"} if run.__module__.rpartition(".")[2] in WITHOUT_RUNS else set()
    return groups | {"Any command": {name: option for name, option in EVERY.items() if name in every}}


def function_parser(run: Callable[..., Any], command: str) -> "ArgumentParser":
    """The options of a command: the arguments of its function, and the fields of those that are dataclasses."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog=called(command), description=COMMANDS[command], exit_on_error=False)
    if "config" not in inspect.signature(run).parameters:
        parser.add_argument("--config", action=ActionConfigFile, help="Settings in YAML; options win.")
    if command not in WITHOUT_RUNS:
        parser.add_argument("--plugin", type=list[str] | str | None, default=None, help=EVERY["plugin"].text)
    groups = option_groups(run)
    for cls in groups.values():
        parser.add_class_arguments(cls, None, as_group=False)
    parser.add_function_arguments(run, as_group=False, skip=set(groups))
    return parser


def help_page(command: str, *, whole: bool = False) -> str:
    """The help of a command: one screen, or all that is known of each option."""
    if command == "pretrain":
        groups, footer = GROUPS, ""
    else:
        groups = _groups(importlib.import_module(f"mim.commands.{command}").run)
        *others, last = [
            f"--{name} {option.value}".rstrip() + f" ({option.text})" for name, option in groups.popitem()[1].items()
        ]
        footer = f"Any command takes {', '.join(others)} and {last}."
    examples = [(f"{called(command)} {args}".rstrip(), remark) for args, remark in EXAMPLES[command]]
    return page(f"mim {__version__}: {COMMANDS[command]}", examples, groups, footer, whole=whole)


def _commands_help() -> str:
    rows = [f"  {name:<20}{text}" for name, text in COMMANDS.items()]
    return "\n".join([f"mim {__version__}: {called('COMMAND')} [--help]", "", *rows])

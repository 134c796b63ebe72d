"""How options are written, the same for every command: what stands on the command line becomes names and values.

``--name value`` and ``--name=value``; dashes are underscores; a switch may stand alone or take ``true`` or ``false``;
lists are ``10,20`` or ``[10,20]``.
"""

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mim.errors import UserError, printable

_NUMBERS = re.compile(r"\s*[-+.\deE]+\s*(,\s*[-+.\deE]+\s*)+")


class UnknownOptionError(UserError):
    """A command does not have the option.

    Attributes:
        option: its name.
        near: whether it is all but one that the command has, and so a slip of a key.
    """

    option: str = ""
    near: bool = False


class Option(NamedTuple):
    """One option of a command.

    Args:
        value: how its value is written in the help; empty for a switch.
        text: what it is for.
        default: what holds if it is not given, in words.
        target: its name in the full schema of a run, without dashes.
        kind: a type of :mod:`mim.options.ranges` that its value must be of, words that it may be, or a union of such.
        lists: whether its value is a list: never, ``always``, if it has ``commas``, or written as one ``text``.
        example: a value that can be typed instead of one that is not of its kind, if it has no default.
    """

    value: str
    text: str
    default: str = ""
    target: str = ""
    kind: Any = None
    lists: str = ""
    example: str = "1"


def read(args: Sequence[str], known: Mapping[str, Option], *, dotted: bool = False) -> list[tuple[str, str]]:
    """Names and values of the options that ``args`` give, in their order.

    Args:
        args: of the command line.
        known: the options that there are, by name.
        dotted: names with dots are of the full schema, which whoever reads it will judge.

    Raises:
        UserError: for a name that is not known, a value that is missing, and a number out of its range.
    """
    return list(_pairs(args, known, dotted))


def _pairs(args: Sequence[str], known: Mapping[str, Option], dotted: bool) -> Iterator[tuple[str, str]]:
    rest, bare = list(args), ""
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") and bare:
            raise UserError(f"--{bare} cannot be {printable(argument)}", why="expected true or false", hint=f"--{bare}")
        if not argument.startswith("--"):
            raise UserError(
                f"{printable(argument)} stands alone",
                why="options begin with two dashes",
                hint=_suggestion(argument, rest, known),
            )
        name, equals, value = argument[2:].partition("=")
        full = dotted and "." in name
        option = None if full else known.get(name := name.replace("-", "_"))
        if not full and option is None:
            raise _unknown(name, value if equals else "".join(rest[:1]), known)
        switch = option is not None and not option.value
        if not equals and rest and not rest[0].startswith("--") and (not switch or rest[0] in ("true", "false")):
            equals, value = "=", rest.pop(0)
        if not equals and not switch:
            raise _valueless(name, option)
        bare = name if switch and not equals else ""
        value = value if equals else "true"
        yield name, _checked(name, as_list(value, option.lists if option else "numbers"), option)


def as_list(value: str, lists: str) -> str:
    """A value as YAML has it, with the brackets that people leave out; one text of commas loses them."""
    bracketed = value.startswith("[") and value.endswith("]")
    if lists == "text":
        return re.sub(r"\s*,\s*", ",", value[1:-1].strip()) if bracketed else value
    wanted = {"": False, "always": value != "null", "commas": "," in value, "numbers": _NUMBERS.fullmatch(value)}[lists]
    return f"[{value}]" if wanted and not value.startswith("[") else value


def _checked(name: str, value: str, option: Option | None) -> str:
    """The value, if it is in its option's range: told here, it is told before anything heavy is imported."""
    if option is None or option.kind is None or value == "null":
        return value
    from mim.options.ranges import fits, words

    if not fits(option.kind, value):
        examples = (option.default, option.example, "0.5")
        example = next(text for text in examples if fits(option.kind, as_list(text, option.lists)))
        why = f"expected {words(option.kind)}"
        raise UserError(f"--{name} cannot be {printable(value[:80])}", why=why, hint=f"--{name} {example}")
    return value


def _unknown(name: str, value: str, known: Mapping[str, Option]) -> UserError:
    if name in ("windows", "stride"):
        return UserError(
            f"--{name} is for pretraining and check_data: this command reads whole images",
            why="a window has no label of its own, and its picture or features are not those of its image",
            hint="images cut into tiles, as gdal_retile.py or vips dzsave do, and --data TILES",
        )
    near = difflib.get_close_matches(name, known, 1)
    hint = "--help"
    if near:
        given = value if value and not value.startswith("--") and known[near[0]].value else known[near[0]].value
        hint = f"--{near[0]} {printable(given)}".rstrip()
    error = UnknownOptionError(f"there is no option --{printable(name)}", hint=hint)
    error.option, error.near = name, bool(difflib.get_close_matches(name, known, 1, cutoff=0.8))
    return error


def _valueless(name: str, option: Option | None) -> UserError:
    """What is told of an option at the end of a line: all words that it takes, and one that works."""
    value = option.value if option else "VALUE"
    words = value.split("|")
    why = f"--{name} {value}" if len(words) > 1 else None
    default = option.default if option else ""
    if default in words or re.fullmatch(r"[-+.\d][-+.\deE,]*", default):
        value = default
    elif re.fullmatch(r"[a-z_|]+", value):
        value = words[0]
    return UserError(f"--{name} needs a value", why=why, hint=f"--{name} {value}")


def _suggestion(argument: str, rest: Sequence[str], known: Mapping[str, Option]) -> str:
    """What a word without dashes may have been meant as: an option's name, or else the first option's value."""
    name, equals, value = argument.lstrip("-").partition("=")
    if near := difflib.get_close_matches(name.replace("-", "_"), known, 1, cutoff=0.8):
        follows = value if equals else "".join(rest[:1])
        given = follows if follows and not follows.startswith("--") else known[near[0]].value
        return f"--{near[0]} {shlex.quote(printable(given))}" if known[near[0]].value else f"--{near[0]}"
    first = next(name for name, option in known.items() if option.value)
    return f"--{first} {shlex.quote(printable(argument))}"

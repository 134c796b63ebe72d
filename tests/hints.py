"""What stands behind ``try:``, read as a user would: the commands and options in it, and whether they parse."""

import importlib
import re
import shlex
from functools import cache
from itertools import pairwise

from mim.cli import COMMANDS, PRETRAIN, _groups, _passed_on, function_parser
from mim.options.config_file import with_config_files
from mim.options.grammar import read
from mim.options.signatures import flat

UNKNOWN = "\0"
"""Stands for what only the moment of the mistake tells."""
FULL_SCHEMA = ("model.", "data.", "trainer.")
CLASSES = ("--config", "--data.views")
"""What else of a call a hint about it builds on."""
PLACEHOLDER = re.compile(rf"{UNKNOWN}|\b[A-Z]{{1,}}\b|\.\.\.")
CALL = re.compile(r"(?:python -m mim |python \S*tools/|mim-)([a-z_-]+?)(?:\.py)?(?=\s|$)")


def suggestions(hint):
    """``(command or None, words)`` of everything in a hint that is to be typed; remarks and prose are left out."""
    for piece in re.split(r",?\s{2,}(?:or|then)\s{2,}|,\s+(?=--)", hint):
        text = re.split(r"\s{3,}|\s+\(", piece.strip())[0]
        text = re.sub(r"^did you mean (--[\w.]+)\?$", r"\1", text)
        called = CALL.search(text)
        start = called.end() if called else text.find("--")
        if called or (start >= 0 and re.search(r"--\w", text)):
            words = shlex.split(text[start:].replace("'", '"'))
            if start and not called:  # a sentence about options, whose words are no values
                words = [word for word in words if word.startswith("--")]
            yield (called[1].replace("-", "_") if called else None), words


@cache
def known_options(command):
    return PRETRAIN if command == "pretrain" else own_options(command) | _handed_on(command)


def own_options(command):
    return PRETRAIN if command == "pretrain" else flat(_groups(importlib.import_module(f"mim.commands.{command}").run))


def _handed_on(command):
    return _passed_on(importlib.import_module(f"mim.commands.{command}").run, own_options(command))


def options_in(words, known):
    """Option to value of a list of words; prose between options is no value of a switch, nor of what has its own."""
    found, rest = {}, list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].rstrip(",").partition("=")
        name = name if "." in name else name.replace("-", "_")
        takes = name not in known or known[name].value or (rest and rest[0] in ("true", "false"))
        if not equals and takes and rest and not rest[0].startswith("--"):
            value = rest.pop(0).rstrip(",")
        found[name] = value
    return found


def fault(command, words, given=()):
    """Why these words do not work behind a command, or None."""
    if command not in COMMANDS:
        return f"there is no command {command}"
    known = known_options(command)
    options = options_in(words, known)
    for name in options:
        if (
            name not in known
            and name not in ("help", "help_all")
            and not (command == "pretrain" and name.startswith(FULL_SCHEMA))
        ):
            return f"{command} has no option --{name}"
    certain = [
        f"--{name}={value}" if value else f"--{name}"
        for name, value in options.items()
        if name not in ("help", "help_all", "print_config", "resume")
        and not PLACEHOLDER.search(value)
        and (value or not getattr(known.get(name), "value", "VALUE"))
    ]
    classes = [f"{name}={value}" for name, value in pairwise(given) if name in CLASSES]
    try:
        _parse(command, [*classes, *certain])
    except Exception as error:  # whatever it is, the words do not work
        return str(error)
    return None


@cache
def _parser(command):
    return function_parser(importlib.import_module(f"mim.commands.{command}").run, command)


def _some_value(option):
    """The first of its words, or a number."""
    words = option.value.split("|")
    return words[0] if len(words) > 1 else 1


def _parse(command, args):
    if command == "pretrain":
        from mim.options.pretraining import translate
        from mim.run.config import parse

        parse(translate(args))
        return
    needed = [
        f"--{name}={_some_value(option)}"
        for name, option in known_options(command).items()
        if option.default == "required"
    ]
    own, passed_on = [], []
    for name, value in read(args, known_options(command)):
        (passed_on if name in _handed_on(command) else own).append(f"--{name}={value}")
    _parser(command).parse_args(with_config_files([*needed, *own]))
    if passed_on:
        _parse("pretrain", passed_on)


def check_hint(command, text, given=()):
    """Asserts that everything to be typed in a ``try:`` line parses, behind its own command or this one."""
    for line in text.splitlines():
        if line.startswith("try:"):
            for own, words in suggestions(line.removeprefix("try:").strip()):
                found = fault(own or command, words, () if own else given)
                assert found is None, f"{line}\n{found}"

"""Where the code makes hints, which of these places tests have reached, and what came of typing what they say."""

import ast
import json
import os
import re
import shlex
import shutil
import sys
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import pytest
from hints import PLACEHOLDER, known_options, suggestions

ROOT = Path(__file__).parents[1]
LEDGER = Path(__file__).with_name("hint_places.yaml")
"""A test for each place that types its hint, or the reason why none does."""
LEAVE_OUT = re.compile(r"leave (--[\w.]+) out")
STOPS = (
    "mim.commands.pretrain.Pretraining._fit",
    "mim.transfer.measurement.Measurement.introduce",
    "mim.benchmark.training.compare",
    "mim.benchmark.inference.measure",
    "mim.commands.make_shapes._write_split",
)
"""Where the work begins: everything that can be refused has been looked at."""


def _calls(node, scope):
    for child in ast.iter_child_nodes(node):
        inner = [*scope, child.name] if isinstance(child, ast.FunctionDef | ast.ClassDef) else scope
        if isinstance(child, ast.Call) and (
            (ast.unparse(child.func).endswith("Error") and any(keyword.arg == "hint" for keyword in child.keywords))
            or ast.unparse(child.func) == "Unclear"  # becomes an error where labels are needed
        ):
            yield ".".join(scope), child
        yield from _calls(child, inner)


@cache
def places():
    """``(file, first line, last line)`` of each call that gives an error its hint, by module, function and number."""
    found = {}
    for path in sorted([*(ROOT / "mim").rglob("*.py"), *(ROOT / "tools").glob("*.py")]):
        counts = {}
        for scope, call in sorted(_calls(ast.parse(path.read_text()), []), key=lambda found: found[1].lineno):
            counts[scope] = counts.get(scope, 0) + 1
            name = f"{path.relative_to(ROOT).as_posix()} {scope} {counts[scope]}"
            found[name] = (str(path), call.lineno, call.end_lineno)
    return found


def place_of(file, line):
    """The name of the place that stands there, or None."""
    at = [
        (last - first, name) for name, (path, first, last) in places().items() if path == file and first <= line <= last
    ]
    return min(at)[1] if at else None


def takes_value(command, option):
    """Whether an option of a command stands before a value."""
    known = known_options(command).get(option.removeprefix("--"))
    return known is None or bool(known.value)


class ReachedTheWork(BaseException):
    """Everything that can be refused before the work begins has been looked at."""


def proposals(hint):
    """``(command or None, words)`` of a hint, as far as they can be typed as they stand."""
    for command, words in suggestions(hint):
        words = _options(words) if command is None else words
        if (command or words) and not any(PLACEHOLDER.search(word) for word in words):
            yield command, words


def _options(words):
    """The options and their values up to where prose begins."""
    found = []
    for word in words:
        if not word.startswith("--") and (not found or not found[-1].startswith("--")):
            break
        found.append(word)
    return found


def without(args, option):
    """The arguments but one option and its values."""
    kept, skipping = [], False
    for arg in args:
        name = arg.split("=")[0]
        skipping = name == option or (skipping and not arg.startswith("--"))
        kept += [] if skipping else [arg]
    return kept


class Typist:
    """Remembers what commands have told, and types what stands behind ``try:``."""

    def __init__(self, file):
        self.file, self.test, self.told, self.heard = file, "", [], []

    def install(self, patch):
        """Errors know the place of their hint, commands are overheard."""
        from mim import cli, errors
        from mim.data.folders import Unclear

        unclear = {}

        def noted(cls, why, hint, _new=Unclear.__new__):
            caller = sys._getframe(1)
            unclear[hint] = place_of(caller.f_code.co_filename, caller.f_lineno)
            return _new(cls, why, hint)

        def made(error, *args, _init=errors.UserError.__init__, **kwargs):
            _init(error, *args, **kwargs)
            caller = sys._getframe(1)
            error.place = place_of(caller.f_code.co_filename, caller.f_lineno) if error.hint else None
            error.place = unclear.get(error.hint, error.place)
            if error.place:
                self.write(place=error.place, raised=True)

        def about(error, *args, _about=errors.UserError.about, **kwargs):
            other = _about(error, *args, **kwargs)
            other.place = error.place
            return other

        def answered(command, args, debug, _answered=cli._answered):
            self.told.clear()
            where = os.getcwd()
            status = _answered(command, args, debug)
            self.heard += [(command, list(args), where, error) for error in self.told]
            return status

        def tell(error, _tell=cli._tell):
            self.told.append(error)
            _tell(error)

        patch.setattr(Unclear, "__new__", noted)
        patch.setattr(errors.UserError, "__init__", made)
        patch.setattr(errors.UserError, "about", about)
        patch.setattr(cli, "_answered", answered)
        patch.setattr(cli, "_tell", tell)

    def write(self, **facts):
        if self.file is not None:
            with self.file.open("a") as out:
                out.write(json.dumps({"test": self.test, **facts}) + "\n")

    def type_all(self):
        """Types the hints of all that was told in this test; a mistake that comes back is a failure."""
        heard, self.heard = self.heard, []
        returned = []
        for command, args, where, error in {(c, tuple(a), w, str(e)): (c, a, w, e) for c, a, w, e in heard}.values():
            if not error.hint:
                continue
            if copying := re.match(r"cp (.+?)\s{2,}then", error.hint):
                with _in(where):
                    shutil.copy(*shlex.split(copying[1]))
            for own, words in proposals(error.hint):
                leaving = LEAVE_OUT.search(error.hint)
                if not own and len(words) == 1 and takes_value(command, words[0]) and not leaving:
                    continue  # a sentence about an option
                for typed in [words] if own else self.mended(args, error, words):
                    answer = self.answer(own or command, typed, where)
                    again = bool(answer) and answer.error == error.error
                    if not again:
                        break
                self.write(
                    place=error.place, typed=[own or command, *typed], answer=answer and answer.error, again=again
                )
                returned += [f"{error}\ntyped: {own or command} {typed}"] if again else []
        self.heard.clear()
        if returned:
            pytest.fail("what is proposed makes the same mistake:\n" + "\n".join(returned))

    def mended(self, args, error, words):
        """The arguments with the words of a hint beside what they were wrong about, or in its place."""
        if unknown := re.search(r"there is no option (--\S+)", error.error):
            args = without(args, unknown[1])
        if alone := re.fullmatch(r"(\S+) stands alone", error.error):
            args = [arg for arg in args if arg != alone[1]]
        for word in words:
            args = without(args, word.split("=")[0]) if word.startswith("--") else args
        if LEAVE_OUT.search(error.hint or "") and len(words) == 1:
            return [args]
        blamed = re.match(r"--[\w.]+", error.error)
        return [[*args, *words], *([[*without(args, blamed[0]), *words]] if blamed else [])]

    def answer(self, command, args, where):
        """What a command says to these arguments, or None if it begins its work."""
        from mim import cli

        self.told.clear()
        with stopping_at_work(), _in(where), suppress(ReachedTheWork, SystemExit):
            cli.main(command, args)
        return self.told[-1] if self.told else None


@contextmanager
def stopping_at_work():
    """Commands end where their work begins."""

    def reached(*args, **kwargs):
        raise ReachedTheWork

    with pytest.MonkeyPatch.context() as patch:
        for stop in STOPS:
            patch.setattr(stop, reached)
        yield


@contextmanager
def _in(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)

"""The options of a command, read off the signature of its function and of the dataclasses that this one takes."""

import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from docstring_parser import parse as parse_docstring

from mim.options.grammar import Option
from mim.options.ranges import Names

_FORMS = {
    "weights": "WEIGHTS",
    "data": "PATH",
    "masks": "PATH",
    "cache": "DIR",
    "out": "DIR",
    "run": "RUN",
    "runs": "RUN,RUN",
    "finetuned": "RUN",
    "teacher": "DIR",
    "config": "FILE",
    "against": "FILE",
    "classes": "FILE",
    "model": "NAME",
    "name": "NAME",
    "split": "NAME",
    "reduction": "NAME",
    "shares": "X,...",
    "methods": "NAME,...",
    "policy": "NAME,...",
}
"""How the value of an option is written in the help where its type says little."""

_UNLESS = re.compile(r"^(?P<text>.*?)[;,] (?P<default>[^;]*?) unless given(?P<rest>,[^;]*)?(?P<more>;.*)?$")

Groups = dict[str, dict[str, Option]]


def option_groups(run: Callable[..., Any]) -> dict[str, Any]:
    """Arguments of a command that stand for several options each."""
    arguments = inspect.signature(run).parameters.items()
    return {name: argument.annotation for name, argument in arguments if is_dataclass(argument.annotation)}


def options_of(run: Callable[..., Any]) -> Groups:
    """The options of a command by heading: a dataclass each, then the function's own arguments."""
    grouped = option_groups(run)
    groups = {_heading(cls): _options(cls) for cls in grouped.values()}
    own = {name: option for name, option in _options(run).items() if name not in grouped}
    return groups | ({"This command" if groups else "Options": own} if own else {})


def _heading(cls: type) -> str:
    first = (inspect.getdoc(cls) or cls.__name__).split("\n\n")[0]
    return re.split(r"[.;:(]", " ".join(first.split()))[0].strip()


def _options(source: Callable[..., Any]) -> dict[str, Option]:
    documented = reversed(source.__mro__) if isinstance(source, type) else [source]  # what is inherited, first
    texts = {
        entry.arg_name: entry.description or ""
        for part in documented
        for entry in parse_docstring(inspect.cleandoc(part.__doc__ or "")).params
    }
    parameters = inspect.signature(source).parameters
    named = {name: parameter for name, parameter in parameters.items() if parameter.kind != parameter.VAR_KEYWORD}
    return {name: _option(parameter, texts.get(name, "")) for name, parameter in named.items()}


def _option(parameter: inspect.Parameter, text: str) -> Option:
    kind = parameter.annotation
    text, default = _split_default(" ".join(text.replace("``", "").split()).rstrip("."))
    if parameter.default is inspect.Parameter.empty:
        default = "required"
    elif parameter.default is not None and parameter.default != "":
        default = _written(parameter.default)
    return Option("" if bool in _members(kind) else _form(parameter.name, kind), text, default, lists=_lists(kind))


def _split_default(text: str) -> tuple[str, str]:
    """What an option is for, and what holds unless it is given, if its docstring says so."""
    if not (found := _UNLESS.match(text)):
        return text, ""
    return found["text"] + (found["more"] or ""), (found["default"] + (found["rest"] or "")).rstrip(",")


def _written(default: object) -> str:
    if isinstance(default, bool):
        return "true" if default else ""
    if isinstance(default, tuple | list):
        return ",".join(map(_written, default))
    return f"{default:g}".replace("e-0", "e-") if isinstance(default, float) else str(default)


def _members(kind: Any) -> tuple[Any, ...]:  # noqa: ANN401 - an annotation
    """The types of a union but for None, or the one type."""
    united = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(member for member in united if member is not type(None))


def _form(name: str, kind: Any) -> str:  # noqa: ANN401 - an annotation
    members = _members(kind)
    if set(members) == {int, str}:
        return "N,..."
    choices = [str(choice) for member in members if get_origin(member) is Literal for choice in get_args(member)]
    if choices and all(get_origin(member) is Literal for member in members):
        return "|".join(choices)
    if (name in _FORMS and members[0] is not Path) or _FORMS.get(name) in ("DIR", "RUN"):
        return _FORMS[name]
    return "|".join(dict.fromkeys(map(_one, members)))


def _one(kind: Any) -> str:  # noqa: ANN401 - an annotation
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return "|".join(map(str, inner))
    if get_origin(kind) in (tuple, list):
        return "LOW,HIGH" if get_origin(kind) is tuple and Ellipsis not in inner else f"{_one(inner[0])},..."
    if kind is Names:
        return "A,B"
    if isinstance(kind, type):
        for known, form in ((int, "N"), (float, "X"), (Path, "FILE")):
            if issubclass(kind, known):
                return form
    return "NAME"


def _lists(kind: Any) -> str:  # noqa: ANN401 - an annotation
    """How :class:`mim.options.grammar.Option` calls it."""
    members = _members(kind)
    if Names in members or set(members) == {int, str}:
        return "text"
    listed = [get_origin(member) in (tuple, list) for member in members]
    return "always" if all(listed) else "commas" if any(listed) else ""


def flat(groups: Groups) -> Mapping[str, Option]:
    """All options of a command by name."""
    return {name: option for options in groups.values() for name, option in options.items()}

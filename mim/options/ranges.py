"""Numbers that an option may be: a signature names the range, the help shows it, and the parser refuses all others.

To a type checker, and to whoever calls from Python, each is a plain ``int`` or ``float``.
"""

import math
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, get_args, get_origin

import yaml
from jsonargparse.typing import register_type

from mim.errors import UserError

MANY = 10**9
"""More steps, epochs or images than anybody counts to."""


_CHECKS: dict[Any, Callable[[object], float]] = {}
"""How each type of numbers is looked at."""


def _numbers(kind: type[float], words: str, low: float, high: float = MANY, *, open_ends: str = "") -> Any:  # noqa: ANN401
    """The type of the numbers from ``low`` to ``high``; ``open_ends`` names those of the two that do not belong to it.

    Values stay plain numbers: jsonargparse's own restricted types would put their classes into checkpoints.
    """

    def checked(value: object) -> float:
        ends = {"low": low, "high": high}
        try:
            number = kind(value)  # type: ignore[arg-type]  # what is no number raises
        except (ValueError, TypeError, OverflowError):
            number = math.nan
        odd = isinstance(value, bool) or (kind is int and isinstance(value, float))
        if odd or not low <= number <= high or number in (ends[end] for end in open_ends.split()):
            raise ValueError(value)
        return number

    made = type(words, (kind,), {})
    register_type(made, kind, checked)
    _CHECKS[made] = checked
    return made


def fits(kind: Any, text: str) -> bool:  # noqa: ANN401 - one of the types below, words, or several of them
    """Whether a value of the command line is of this kind."""
    try:
        return _is(kind, yaml.safe_load(text))
    except yaml.YAMLError:
        return False


def words(kind: Any) -> str:  # noqa: ANN401 - as of fits
    """What a value of this kind is: ``an int from 1 to 1e9``, ``one of mean, cls``."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}" if len(get_args(kind)) > 1 else str(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(words, get_args(kind)))
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return "several of them" if item in _CHECKS else f"some of {', '.join(get_args(item))}"
    return f"{'an' if kind.__name__.startswith('int') else 'a'} {kind.__name__}"


def _is(kind: Any, value: object) -> bool:  # noqa: ANN401 - as of fits
    if get_origin(kind) is Literal:
        return str(value) in map(str, get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is(member, value) for member in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(get_args(kind)[0], item) for item in value)
    try:
        _CHECKS[kind](value)
    except ValueError:
        return False
    return True


def _joined(value: object) -> str:
    """Names with commas between them, from a list or from one text."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


if TYPE_CHECKING:
    Count: TypeAlias = int
    Whole: TypeAlias = int
    Processes: TypeAlias = int
    Side: TypeAlias = int
    Threads: TypeAlias = int
    Seed: TypeAlias = int
    Positive: TypeAlias = float
    NotNegative: TypeAlias = float
    Share: TypeAlias = float
    SomeShare: TypeAlias = float
    ShareBelowOne: TypeAlias = float
    ProperShare: TypeAlias = float
    Number: TypeAlias = float
    Names: TypeAlias = str
else:
    Count = _numbers(int, "int from 1 to 1e9", 1)
    Whole = _numbers(int, "int from 0 to 1e9", 0)
    Processes = _numbers(int, "int from 0 to 1024", 0, 1024)
    Side = _numbers(int, "int from 16 to 8192", 16, 8192)
    Threads = _numbers(int, "int from 1 to 1024", 1, 1024)
    Seed = _numbers(int, "int from 0 to 2^63 - 1", 0, 2**63 - 1)
    Positive = _numbers(float, "float above 0 to 1e9", 0, open_ends="low")
    NotNegative = _numbers(float, "float from 0 to 1e9", 0)
    Share = _numbers(float, "float from 0 to 1", 0, 1)
    SomeShare = _numbers(float, "float above 0 to 1", 0, 1, open_ends="low")
    ShareBelowOne = _numbers(float, "float from 0 to below 1", 0, 1, open_ends="high")
    ProperShare = _numbers(float, "float above 0 to below 1", 0, 1, open_ends="low high")
    Number = _numbers(float, "float", -math.inf, math.inf)
    Names = type("names with commas", (str,), {})
    register_type(Names, str, _joined)


def check_rising(option: str, ends: tuple[float, float]) -> None:
    """Refuses a smallest and a largest that are the wrong way round."""
    low, high = ends
    if low > high:
        why = "the smaller number comes first"
        raise UserError(f"{option} [{low:g},{high:g}] is no range", why=why, hint=f"{option} [{high:g},{low:g}]")

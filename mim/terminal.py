"""What a person at a terminal sees: bars that fit it, colours unless they are not wanted; elsewhere plain lines."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Literal, TextIO, TypeVar

Item = TypeVar("Item")
Colour = Literal["red", "green", "yellow", "bold", "dim"]

_CODES: dict[Colour, int] = {"red": 31, "green": 32, "yellow": 33, "bold": 1, "dim": 2}
_FIRST, _EVERY = 5.0, 15.0
"""Seconds after which work that nobody watches says that it goes on, and from then on."""


def watched(stream: TextIO | None = None) -> bool:
    """Whether a person is watching the stream, standard output unless given."""
    return (stream or sys.stdout).isatty()


def coloured(stream: TextIO | None = None) -> bool:
    """Whether the stream shows colours, and the person has not asked for none (https://no-color.org)."""
    return watched(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: Colour, stream: TextIO | None = None) -> str:
    """The text in a colour where that can be seen, as it is elsewhere."""
    return f"\033[{_CODES[colour]}m{text}\033[0m" if coloured(stream) else text


def progress(items: Iterable[Item], total: int, what: str, unit: str = "image") -> Iterator[Item]:
    """The items, telling on standard error how many of them are done.

    Args:
        items: what is worked on, one after another.
        total: how many there are.
        what: is done to them, such as ``reading``.
        unit: one of them.
    """
    from tqdm import tqdm

    if watched(sys.stderr):
        yield from tqdm(items, total=total, desc=what, unit=unit, dynamic_ncols=True, leave=False, delay=0.5)
        return
    started = time.monotonic()
    due = started + _FIRST
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now >= due and done < total:
            due = now + _EVERY
            left = (now - started) / done * (total - done)
            print(f"  {what}  {unit} {done:,}/{total:,}  about {left:,.0f} s left", file=sys.stderr, flush=True)

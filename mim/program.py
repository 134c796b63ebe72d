"""How this program was started, so that what it tells people to type, and what it writes down, works for them."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_ASKED = ContextVar("_ASKED", default="")
"""A call of Python, which no command line tells."""
_TYPED = ContextVar[tuple[str, Sequence[str]] | None]("_TYPED", default=None)
"""Name and arguments of the command that is carried out."""


@contextmanager
def asked_from_python(call: str) -> Iterator[None]:
    """Inside, what is written about where things come from tells this call."""
    token = _ASKED.set(call)
    try:
        yield
    finally:
        _ASKED.reset(token)


@contextmanager
def typed(command: str, arguments: Sequence[str]) -> Iterator[None]:
    """Inside, what is written about where things come from tells this command line."""
    token = _TYPED.set((command, arguments))
    try:
        yield
    finally:
        _TYPED.reset(token)


def origin(command: str, arguments: Sequence[str] | None = None) -> str | None:
    """How to ask for this again: a call of Python or a command line; None if neither was given.

    Args:
        command: that is carried out.
        arguments: of it if they say more than what was typed.
    """
    if call := _ASKED.get():
        return call
    if arguments is None:
        known = _TYPED.get()
        if known is None or known[0] != command:
            return None
        arguments = known[1]
    return shlex.join(["python", "-m", "mim", command, *arguments])


def quoted(*words: object) -> str:
    """Paths and other words as a shell takes them."""
    return shlex.join(map(str, words))


def called(command: str) -> str:
    """The start of a command line that runs ``command``, in the form in which this process was started itself.

    ``python tools/knn.py`` in a checkout, ``mim-knn`` from an installed script, ``python -m mim knn`` everywhere else.
    """
    script = Path(sys.argv[0])
    if script.name.startswith("mim-"):
        return f"mim-{command.replace('_', '-')}"
    if script.parent.name == "tools" and script.suffix == ".py":
        return f"python {shlex.quote(str(script.with_name(f'{command}.py')))}"
    return f"python -m mim {command}"

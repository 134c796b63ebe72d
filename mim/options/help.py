"""The help of a command: one screen, the options in groups, each with its unit and what holds without it."""

import re
import textwrap
from collections.abc import Mapping, Sequence

from mim.options.grammar import Option

WIDTH = 100
_LEFT = 28


def page(
    title: str,
    examples: Sequence[tuple[str, str]],
    groups: Mapping[str, Mapping[str, Option]],
    footer: str,
    *,
    whole: bool,
) -> str:
    """The help of a command.

    Args:
        title: what the command does, in a line.
        examples: command lines, each with a remark.
        groups: the options by heading.
        footer: what is said at the end, if anything.
        whole: all that is known of each option, over several lines; what does not fit into one line is left out else.
    """
    wide = max(len(line) for line, _ in examples) + 3
    lines = [title, *(f"  {line:<{wide}}{remark}".rstrip() for line, remark in examples)]
    for heading, options in groups.items():
        lines += ["", f"{heading}:"]
        for name, option in options.items():
            lines += _entry(name, option, whole)
    end = textwrap.wrap(footer, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, *(["", *end] if end else [])])


def _entry(name: str, option: Option, whole: bool) -> list[str]:
    head = f"  --{name} {option.value}".rstrip()
    text = option.text
    if len(head) >= _LEFT and "|" in option.value:  # the choices do not fit in front
        choices = option.value.split("|")
        told = all(choice in text for choice in choices)
        head, text = f"  --{name} NAME", text if told else f"{', '.join(choices)}: {text}"
    default = f"  [{option.default}]" if option.default else ""
    room = WIDTH - _LEFT
    body = f"{text}{default}" if whole else f"{_brief(text, room - len(default))}{default}"
    rows = textwrap.wrap(body, room, break_long_words=False, break_on_hyphens=False) or [""]
    if len(head) >= _LEFT:
        return [head, *(f"{'':<{_LEFT}}{row}" for row in rows)]
    return [f"{head:<{_LEFT}}{rows[0]}", *(f"{'':<{_LEFT}}{row}" for row in rows[1:])]


def _brief(text: str, room: int) -> str:
    """As many whole clauses of a text as fit; the first one at least."""
    for marks in (r"[;:.] |$", r"[;:.,] |$"):
        ends = [match.start() for match in re.finditer(marks, text)]
        ends = [end for end in ends if text.count("(", 0, end) == text.count(")", 0, end)]
        if fitting := [end for end in ends if end <= room]:
            return text[: max(fitting)]
    return text[: ends[0]]

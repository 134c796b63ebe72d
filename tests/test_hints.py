"""Every hint that stands in the code, as far as it stands there: its commands exist, its options exist and parse.

What only the moment tells (paths, numbers that were worked out) is checked where the mistakes are made:
``test_messages.py`` and ``trust/test_misconfigurations.py`` parse every ``try:`` line that they provoke.
"""

import ast
from pathlib import Path

import pytest
from hints import UNKNOWN, check_hint, fault, suggestions

from mim.cli import COMMANDS

ROOT = Path(__file__).parents[1] / "mim"
SLOWEST_LAST = [*(command for command in COMMANDS if command != "pretrain"), "pretrain"]
"""Where an option may belong; the schema of a run takes longest."""


def text_of(node):
    """A string of the source; ``called("x")`` in it is what people read, everything else that is put in is unknown."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "called" and isinstance(node.args[0], ast.Constant):
        return f"python -m mim {node.args[0].value}"
    return UNKNOWN


def strings(node):
    """The texts that an expression may have."""
    if isinstance(node, ast.IfExp):
        return [*strings(node.body), *strings(node.orelse)]
    return [text_of(node)]


def hints_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            values = [keyword.value for keyword in node.keywords if (keyword.arg or "").endswith(("hint", "otherwise"))]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and "hint" in node.targets[0].id:
            values = [node.value]
        else:
            continue
        for value in values:
            for text in strings(value):
                yield node.lineno, text


HINTS = [
    pytest.param(text, id=f"{path.relative_to(ROOT)}:{line}-{place}")
    for path in sorted(ROOT.rglob("*.py"))
    for place, (line, text) in enumerate(hints_of(path))
    if list(suggestions(text))
]


def test_there_are_hints():
    assert len(HINTS) > 80


@pytest.mark.parametrize("text", HINTS)
def test_what_a_hint_says_can_be_typed(text):
    for command, words in suggestions(text):
        faults = {}
        for candidate in [command] if command else SLOWEST_LAST:
            faults[candidate] = fault(candidate, words)
            if faults[candidate] is None:
                break
        else:
            pytest.fail(f"{text!r}: {faults}")


@pytest.mark.parametrize("line", ["--epohcs 3", "python -m mim knn --kk 3", "--epochs 0", "python -m mim nothing"])
def test_a_hint_that_does_not_work_would_be_found(line):
    with pytest.raises(AssertionError):
        check_hint("pretrain", f"error: x\ntry:   {line}")

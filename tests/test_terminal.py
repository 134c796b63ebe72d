"""A person at a terminal sees bars and colours, all others plain lines: with a real terminal behind the process."""

import io
import os
import pty
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

from mim import terminal

ROOT = Path(__file__).parents[1]
ESCAPE = "\033["
WORK = """
import sys, time
from mim.terminal import paint, progress
for _ in progress(range(40), 40, "reading"):
    time.sleep(0.03)
print(paint("done", "green"))
"""


def at_a_terminal(script, columns=60, **environment):
    """What a script writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    settings = known | {"TERM": "xterm", "PYTHONPATH": str(ROOT), **environment}
    with subprocess.Popen([sys.executable, "-c", script], stdin=theirs, stdout=theirs, stderr=theirs, env=settings):
        os.close(theirs)
        written = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux says so when the other side is gone
                break
            if not part:
                break
            written += part
    os.close(ours)
    return written.decode()


def test_a_bar_fits_the_terminal_and_leaves_nothing_behind():
    written = at_a_terminal(WORK, columns=60)
    bars = [line for line in written.replace("\n", "\r").split("\r") if "reading" in line]
    assert bars
    assert all(len(line) <= 60 for line in bars)
    assert written.rstrip().endswith(f"{ESCAPE}32mdone{ESCAPE}0m")


def test_no_color_is_respected():
    assert f"{ESCAPE}32m" not in at_a_terminal(WORK, NO_COLOR="1")
    assert f"{ESCAPE}32m" not in at_a_terminal(WORK, TERM="dumb")


def test_a_mistake_has_a_red_head_at_a_terminal_alone():
    script = "import sys; from mim.cli import main; sys.exit(main('knn', ['--weights']))"
    assert f"{ESCAPE}31merror:{ESCAPE}0m" in at_a_terminal(script)
    plain = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert plain.stderr.startswith("error:")
    assert ESCAPE not in plain.stderr


def test_without_a_terminal_long_work_says_now_and_then_how_far_it_is(monkeypatch, capsys):
    clock = iter(range(0, 1000, 2))  # every look at it is two seconds later
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    assert list(terminal.progress(range(20), 20, "reading")) == list(range(20))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  reading  image 3/20  about 34 s left"
    assert len(lines) == 3
    assert all(ESCAPE not in line and "\r" not in line for line in lines)


def test_short_work_says_nothing_without_a_terminal(capsys):
    assert list(terminal.progress(iter("abc"), 3, "reading")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


class Watched(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "painted"), [(Watched(), True), (io.StringIO(), False)])
def test_colours_are_for_those_who_watch(monkeypatch, stream, painted):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert (terminal.paint("x", "red", stream) == f"{ESCAPE}31mx{ESCAPE}0m") is painted
    assert (terminal.paint("x", "red", stream) == "x") is not painted

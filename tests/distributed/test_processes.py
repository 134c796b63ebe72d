import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mim.distributed.processes import STOP_SIGNALS, process_rank

NAMES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


@pytest.mark.parametrize(
    ("given", "rank"),
    [({}, 0), ({"LOCAL_RANK": "1"}, 1), ({"SLURM_PROCID": "3"}, 3), (dict(zip(NAMES, "520", strict=True)), 5)],
)
def test_the_rank_is_what_the_launcher_says(monkeypatch, given, rank):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert process_rank() == rank


WAITING = """
import ctypes, os, subprocess, sys
from mim.distributed.processes import leaving_on_signals
with leaving_on_signals():
    command = [sys.executable, *sys.orig_argv[1:-1], str(int(sys.argv[1]) - 1)]
    others = [subprocess.Popen(command)] if sys.argv[1] != "0" else []
    print(os.getpid(), flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
"""A process that waits in a library, where Python hears of no signal, and that has started as many as it is told."""


@pytest.fixture
def waiting():
    """Starts such processes; gives the first one, and the ids of all."""
    started = []

    def start(others):
        pipe = {"stdout": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", WAITING, str(others)]
        started.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipe))
        ids = {int(started[-1].stdout.readline()) for _ in range(others + 1)}
        return started[-1], [started[-1].pid, *(ids - {started[-1].pid})]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def gone(pid):
    """Whether a process ends within seconds; one that is dead and not yet collected has ended."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_a_process_that_waits_in_a_library(number, waiting):
    process, _ = waiting(0)
    process.send_signal(number)
    assert process.wait(timeout=5) == 75


@pytest.mark.parametrize("to", [(0,), (1,), (0, 1)], ids=["the first", "the second", "both"])
def test_a_signal_to_any_of_them_ends_all_with_the_status_of_the_first(to, waiting):
    process, ids = waiting(1)
    for who in to:
        os.kill(ids[who], signal.SIGTERM)
    assert process.wait(timeout=5) == 75
    assert gone(ids[1])


def test_no_process_outlives_the_one_that_started_it(waiting):
    process, ids = waiting(1)
    process.kill()
    process.wait(timeout=5)
    assert gone(ids[1])

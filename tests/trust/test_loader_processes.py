"""A loader process that dies under a run of the real command: an end in three lines, nobody left, an exact resume."""

import os
import random
import resource
import signal
import time

import pytest
from strikes import Trial, differences, family, finish, leftovers, orphans, start, unreadable, wait_for_steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loaders")


@pytest.mark.parametrize("number", range(10))
def test_a_run_whose_loader_process_is_killed_ends_soon_and_goes_on_exactly(number, folder, tmp_path):
    chance, trial, run = random.Random(number), Trial("mae", folder), tmp_path / "run"
    process = start(*trial.settings, "--num_workers", 2, "--out", run)
    wait_for_steps(process, chance.randint(1, 12))
    time.sleep(chance.random() * 0.1)
    kin = family(process.pid)
    os.kill(chance.choice(kin), signal.SIGKILL)
    struck = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 4, output
    assert time.monotonic() - struck < 30  # 10 s on a machine that does nothing else
    assert "error: a loader process died" in output
    assert f"--resume {run}" in output
    assert "Traceback" not in output
    assert orphans(kin) == unreadable(run) == leftovers(run) == []
    status, output = finish("--resume", run)
    assert status == 0, output
    assert differences(trial.whole(), run) == []


def test_a_run_without_memory_ends_in_three_lines_and_goes_on_exactly(folder, tmp_path):
    trial, run = Trial("mae", folder), tmp_path / "run"
    process = start(*trial.settings, "--out", run)
    wait_for_steps(process, 6)
    with open(f"/proc/{process.pid}/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE")  # what it has, and no more
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 4, output
    assert "error: out of memory" in output
    assert "Traceback" not in output
    assert unreadable(run) == []
    status, output = finish("--resume", run)
    assert status == 0, output
    assert differences(trial.whole(), run) == []

"""A few trials of each kind; ``python tests/trust/strikes.py --trials 50`` is the whole harness."""

import random
import resource
import signal
import time

import pytest
from strikes import SETTINGS, SIGNALS, Trial, differences, finish, leftovers, start, unreadable, wait_for_steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strikes")


@pytest.mark.parametrize("aimed", [False, True], ids=["at random", "while saving"])
@pytest.mark.parametrize("method", SETTINGS)
def test_a_killed_run_ends_as_if_nobody_had_touched_it(method, aimed, folder):
    trial = Trial(method, folder, workers=2, accumulate=2, aimed=aimed)
    trial.play(3, random.Random(repr((method, aimed))))
    assert trial.problems == []


@pytest.mark.parametrize("number", SIGNALS.values(), ids=SIGNALS)
@pytest.mark.parametrize("method", SETTINGS)
def test_a_signal_loses_no_step_and_ends_with_75(method, number, folder):
    trial = Trial(method, folder, workers=2, number=number)
    trial.play(2, random.Random(repr((method, number))))
    assert trial.problems == []
    assert trial.redone == 0


@pytest.mark.parametrize("moment", [0.5, 2, 4, 6, 8])
def test_a_signal_outside_of_training_ends_with_75_too(moment, tmp_path):
    process = start(*SETTINGS["mae"], "--out", tmp_path / "run", "--resume", "auto")
    time.sleep(moment)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    # A moment after the start the interpreter itself has not taken the signal over yet.
    assert process.returncode in ((75, -signal.SIGTERM) if moment < 1 else (75, 0))
    assert "Traceback" not in output


@pytest.mark.parametrize("limit", [100, 2_000, 20_000, 500_000, 3_000_000])
def test_a_full_disk_ends_in_three_lines_and_the_run_goes_on_exactly(limit, folder, tmp_path):
    trial = Trial("mae", folder)
    run = tmp_path / "run"
    process = start(*trial.settings, "--out", run, "--resume", "auto")
    wait_for_steps(process, 9)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "cannot be written" in output
    assert "Traceback" not in output
    assert unreadable(run) == leftovers(run) == []
    status, output = finish("--resume", run)
    assert status == 0, output
    assert differences(trial.whole(), run) == []

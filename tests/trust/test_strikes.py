"""A few trials of each kind; ``python tests/trust/strikes.py --trials 50`` is the whole harness."""

import random
import re
import resource
import signal
import subprocess
import time
from contextlib import suppress

import pytest
from recipes import SAVE_EVERY, SETTINGS
from strikes import (
    SIGNALS,
    Trial,
    checkpoints,
    differences,
    final_state,
    finish,
    leftovers,
    start,
    unreadable,
    wait_for_steps,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strikes")


@pytest.mark.parametrize(
    ("aimed", "workers"), [pytest.param(False, 0, marks=pytest.mark.middle), (False, 2), (True, 2)]
)
@pytest.mark.parametrize("method", SETTINGS)
def test_a_killed_run_ends_as_if_nobody_had_touched_it(method, aimed, workers, folder):
    """At random moments, or while it saves."""
    trial = Trial(method, folder, workers=workers, accumulate=2, aimed=aimed)
    trial.play(3, random.Random(repr((method, aimed, workers))))
    assert trial.problems == []


@pytest.mark.parametrize("number", SIGNALS.values(), ids=SIGNALS)
@pytest.mark.parametrize("method", SETTINGS)
def test_a_signal_loses_no_step_and_ends_with_75(method, number, folder):
    trial = Trial(method, folder, workers=2, number=number)
    trial.play(2, random.Random(repr((method, number))))
    assert trial.problems == []
    assert trial.redone == 0


DINOV3 = (
    "--model",
    "vit_small_patch16_dinov3",
    "--model.init_args.encoder.kwargs",
    '{"depth": 2}',
    "--epochs",
    "0.375",
)


@pytest.mark.parametrize("method", [name for name in SETTINGS if name != "mp3"])  # which refuses to be told places
def test_dinov3_of_two_blocks_goes_on_exactly_after_a_kill_in_its_24_steps(method, folder):
    trial = Trial(method, folder, extra=DINOV3)
    trial.play(1, random.Random(method))
    assert len(trial.statuses) == 1
    assert trial.problems == []
    state = final_state(trial.whole())
    assert state["global_step"] == 24
    assert state["state_dict"]["encoder.vit.reg_token"].shape == (1, 4, 384)


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
    assert process.returncode == 4, output
    assert "cannot be written" in output
    assert "Traceback" not in output
    assert unreadable(run) == leftovers(run) == []
    status, output = finish("--resume", run)
    assert status == 0, output
    assert differences(trial.whole(), run) == []


def step_said(number):
    """Until the run has told of a step."""
    return lambda process, run: wait_for_steps(process, number)


def saved(step):
    """Until a checkpoint is there and the one that it replaces is gone."""
    there, gone = (f"checkpoints/step-{number:08}.ckpt" for number in (step, step - 2 * SAVE_EVERY))
    return until(lambda run: (run / there).exists() and not (run / gone).exists())


def until(condition):
    """Until something is true of the run's folder, as far as one can see from outside; returns no lines."""

    def wait(process, run):
        while process.poll() is None and not condition(run):
            time.sleep(0.001)
        return []

    return wait


MOMENTS = {
    "before the first checkpoint": step_said(1),
    "between two checkpoints": step_said(6),
    "before the last pictures": step_said(24),
    "before the export": saved(24),
    "before the last report": until(lambda run: (run / "export" / "backbone" / "SHA256SUMS").exists()),
}


@pytest.fixture
def disk(tmp_path):
    """A file system of 24 MiB, on which a run of eight has room."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", path], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a file system of one's own wants the right to mount: {mount.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def fill(path):
    """Takes every byte that is left; returns what to remove to have them back."""
    ballast = path / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return ballast


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_disk_without_a_byte_left_ends_in_three_lines_and_the_run_goes_on_exactly(moment, folder, disk):
    trial = Trial("mae", folder)
    whole, run = trial.whole(), disk / "run"
    args, env = [*trial.settings, "--out", run, "--resume", "auto"], {"TMPDIR": str(disk)}
    process = start(*args, env=env)
    said = MOMENTS[moment](process, run)
    process.send_signal(signal.SIGSTOP)
    ballast, before = fill(disk), checkpoints(run)
    process.send_signal(signal.SIGCONT)
    output = "".join(said) + process.communicate(timeout=120)[0]
    assert process.returncode == 4, output
    error, why, hint = output.splitlines()[-3:]
    assert error.startswith(f"error: {run}")
    assert error.endswith("cannot be written: No space left on device")
    assert why.startswith("why:   ")
    assert why.endswith("0 MiB are free") or why.endswith("0 MiB are free there")
    assert hint.startswith("try:   make room, then  ")
    assert not re.search("Traceback|Exception|Error", output), output
    assert set(before) <= set(checkpoints(run))
    assert unreadable(run) == leftovers(run) == []
    ballast.unlink()
    status, output = finish(*args, env=env)
    assert status == 0, output
    assert differences(whole, run) == []


def test_a_disk_that_is_full_before_the_start_is_refused(disk):
    fill(disk)
    status, output = finish(*Trial("mae", disk).settings, "--out", disk / "run", env={"TMPDIR": str(disk)})
    assert status == 2, output
    error, why, _ = output.splitlines()[-3:]
    assert re.fullmatch(rf"error: --out {disk}/run: checkpoints need \d+ MiB, 0 MiB are free", error)
    assert re.fullmatch(r"why:   \d+ MiB each: 2 are kept, the next is written beside them, one is in reserve", why)
    assert not (disk / "run").exists()

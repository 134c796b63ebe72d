"""A file that cannot be read turns up in the middle of a run: named, counted and judged by all processes alike."""

import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from hostile import bad, legal
from PIL import Image
from recipes import ROOT, SETTINGS
from strikes import checkpoints, family, finish, start, step_of

from mim.cli import main

BAD, STEP, STEPS = 95, 5, 8
"""Not among the files that are read before training; in the second half of the batch of the fifth step."""


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(300):
        Image.new("RGB", (40, 36), (number % 256, 0, 255 - number % 256)).save(folder / f"{number:03}.png")
    (folder / f"{BAD:03}.png").write_bytes((folder / "000.png").read_bytes()[:60])
    return folder


def settings(photos, out, *more):
    length = ["--epochs", STEPS * 16 / 300, "--save_every", "10", "--eval_every", "10", "--pictures", "0"]
    return list(map(str, [*SETTINGS["mae"], "--data", photos, "--out", out, *length, *more]))


def summary(run):
    return json.loads((run / "summary.json").read_text())


def assert_stopped(run, photos, output):
    """All three lines, and a run that can go on without a step done twice."""
    assert "error: 1 of 300 images are unreadable (0.3%, limit 0.0%)" in output
    assert f"why:   first: {photos}/{BAD:03}.png (" in output
    assert f"try:   python tools/pretrain.py --resume {run} --max_bad 0.05 " in output
    assert "Traceback" not in output
    assert summary(run)["status"] == "failed"
    assert (run / "bad_files.txt").read_text().startswith(f"{photos}/{BAD:03}.png\t")
    assert [step_of(path) for path in checkpoints(run)] == [STEP]


def test_a_strict_run_stops_at_the_first_bad_file_and_says_how_to_go_on(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    assert main("pretrain", settings(photos, run, "--max_bad", "0")) == 2
    assert_stopped(run, photos, capsys.readouterr().err)
    assert main("pretrain", ["--resume", str(run)]) == 2  # nothing has changed: no further step
    assert_stopped(run, photos, capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_the_second_process_finds_counts_for_all(strategy, photos, tmp_path):
    two = ["--devices", "2", "--strategy", strategy, "--trainer.accelerator", "cpu"]
    strict, tolerant = tmp_path / "strict", tmp_path / "tolerant"
    status, output = finish(*settings(photos, strict, *two, "--max_bad", "0"))
    assert status == 2, output
    assert_stopped(strict, photos, output)
    status, output = finish("--resume", strict, "--max_bad", "0.05")
    assert status == 0, output
    status, output = finish(*settings(photos, tolerant, *two, "--max_bad", "0.05"))
    assert status == 0, output
    assert output.count("cannot be read") == 1
    assert f"skipped  1 unreadable files, listed in {tolerant / 'bad_files.txt'}" in output
    assert summary(tolerant)["bad_files"] == 1
    one, other = (torch.load(checkpoints(run)[-1], weights_only=True)["state_dict"] for run in (strict, tolerant))
    assert all(torch.equal(value, other[name]) for name, value in one.items())  # the stop has changed nothing


def memory_of(process, most):
    """Keeps in ``most`` what a process and all that it started held at most, in MiB; shared pages count once."""
    while process.poll() is None:
        held = 0
        for pid in [process.pid, *family(process.pid)]:
            try:
                held += int(re.search(r"Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())[1])
            except (OSError, TypeError):  # it has just ended
                continue
        most[0] = max(most[0], held / 1024)
        time.sleep(0.1)


@pytest.mark.slow
def test_a_run_over_nothing_but_hostile_files_names_every_bad_one_and_stays_small(tmp_path):
    folder, run = tmp_path / "photos", tmp_path / "run"
    folder.mkdir()
    fine, broken = list(legal()), list(bad())
    for case in (*fine, *broken):
        (folder / case.name).write_bytes(case.data)
    rest = ["--epochs", "3", "--max_bad", "1", "--num_workers", "2", "--out", run]
    process, most = start(*SETTINGS["mae"], "--data", folder, *rest), [0]
    watch = threading.Thread(target=memory_of, args=(process, most))
    watch.start()
    output, _ = process.communicate(timeout=300)
    watch.join()
    assert process.returncode == 0, output
    assert "Traceback" not in output
    named = {line.split("\t")[0].rpartition("/")[2] for line in (run / "bad_files.txt").read_text().splitlines()}
    assert named == {case.name for case in broken}
    print(f"{len(fine)} legal and {len(broken)} bad files: {most[0]:.0f} MiB at most")
    assert 100 < most[0] < 4096

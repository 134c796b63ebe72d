"""Loader processes that die or hang are noticed, and the file in their hands is named."""

import multiprocessing
import os
import signal
import time
import traceback

import pytest
import torch

from mim.data import loading
from mim.data.loading import WatchedLoader, reading
from mim.errors import MACHINE_ERRORS, UserError
from mim.run.failures import as_machine_error


class Files(torch.utils.data.Dataset):
    """Numbers 0 to 7 as files; what happens in the middle of reading is up to the test."""

    def __init__(self, happens):
        self.happens = happens

    def __len__(self):
        return 8

    def __getitem__(self, number):
        with reading(f"folder/{number}.jpg"):
            self.happens(number)
        return number


def dies(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def hangs(number):
    if number == 5:
        time.sleep(60)


def fails(number):
    if number == 5:
        raise ValueError("a bug")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(loading, "STALL", 2)


def failure(happens, workers=2, **settings):
    """What the user is told."""
    loader = WatchedLoader(Files(happens), num_workers=workers, batch_size=2)
    try:
        list(loader)
    except (*MACHINE_ERRORS, ValueError) as error:
        found = as_machine_error(error, **settings)
        traceback.clear_frames(error.__traceback__)  # in them are loops around the loader, which leaves at once without
        return found
    raise AssertionError("nothing failed")


def test_a_loader_process_that_dies_is_reported_with_its_file():
    found = failure(dies, loader_hint="again")
    assert found.error == "a loader process died while it read folder/5.jpg"
    assert found.hint == "again"
    assert found.alone


def test_a_loader_process_that_dies_after_an_earlier_training_is_noticed_at_once():
    """Lightning's trainer puts every signal handler back that it found before it trained, SIGCHLD's of torch, too."""
    list(WatchedLoader(Files(lambda number: None), num_workers=1))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    began = time.monotonic()
    failure(dies)
    assert time.monotonic() - began < loading.STALL / 2


def test_a_loader_process_that_hangs_ends_the_run_with_its_file(impatient):
    found = failure(hangs)
    assert found.error == "a loader process gave nothing for 2 s while it read folder/5.jpg"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_file_or_a_bug_is_not_taken_for_a_dead_loader(workers):
    assert failure(fails, workers) is None


def refuses(number):
    raise UserError(f"{number} is refused", why="it is a number", hint="--numbers none")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_that_a_loader_process_finds_is_told_in_three_lines(workers):
    with pytest.raises(UserError) as refused:
        list(WatchedLoader(Files(refuses), num_workers=workers, batch_size=2))
    assert str(refused.value) == "error: 0 is refused\nwhy:   it is a number\ntry:   --numbers none"


def test_no_file_is_named_for_a_death_between_two_files():
    loader = WatchedLoader(Files(lambda number: None), num_workers=2, batch_size=2)
    assert [row.tolist() for row in loader] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    pids, names = zip(*loader.in_hands(), strict=True)
    assert len(set(pids)) == 2
    assert names == ("", "")


def test_a_name_of_any_length_and_alphabet_fits():
    for name in ("", "ö" * 2000, "\udcff.jpg"):
        row = torch.zeros(1, 1024, dtype=torch.uint8)
        loading._row = row[0].numpy()
        try:
            with reading(name):
                shown = row[0].numpy().tobytes().rstrip(b"\0")
            assert shown == name.encode(errors="replace")[:1024]
            assert not row.any()
        finally:
            loading._row = None


def test_memory_of_the_machine_that_runs_out_is_told_from_a_bug():
    with pytest.raises(RuntimeError) as stop:
        torch.empty(1 << 60)
    found = as_machine_error(stop.value, at=" at batch 16 per device")
    assert found.error == "out of memory at batch 16 per device"
    assert "can't allocate memory" in found.why
    assert as_machine_error(RuntimeError("shapes do not fit")) is None


def test_processes_of_the_program_around_us_outlive_ours():
    """From Python a run is a guest: what it ends at exit are its own loader processes."""
    handler = signal.getsignal(signal.SIGCHLD)
    earlier = set(multiprocessing.active_children())  # of other tests
    other = multiprocessing.Process(target=time.sleep, args=(60,))
    other.start()
    batches = iter(WatchedLoader(torch.arange(4), num_workers=1))
    next(batches)
    (loader,) = set(multiprocessing.active_children()) - {other, *earlier}
    try:
        loading._end_all()
        loader.join(10)
        assert not loader.is_alive()
        assert other.is_alive()
    finally:
        signal.signal(signal.SIGCHLD, handler)
        other.kill()
        other.join()

"""A run leaves the process that it was called in as it found it."""

import logging
import os
import random
import signal
import threading
import warnings

import numpy as np
import pytest
import torch

from mim.run.surroundings import left_as_they_were

CHANGES = {
    "threads": (torch.get_num_threads, lambda: torch.set_num_threads(3)),
    "random numbers of torch": (lambda: torch.get_rng_state().tolist(), lambda: torch.rand(1)),
    "random numbers of Python": (random.getstate, random.random),
    "random numbers of NumPy": (
        lambda: np.random.get_state()[1].tolist(),  # noqa: NPY002 - what libraries draw from
        lambda: np.random.rand(700),  # noqa: NPY002
    ),
    "handler of SIGTERM": (
        lambda: signal.getsignal(signal.SIGTERM),
        lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    ),
    "handler of SIGCHLD": (
        lambda: signal.getsignal(signal.SIGCHLD),
        lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    ),
    "warnings": (lambda: list(warnings.filters), lambda: warnings.filterwarnings("ignore", message="xyz")),
    "how warnings are shown": (lambda: warnings.showwarning, lambda: setattr(warnings, "showwarning", print)),
    "errors of threads": (lambda: threading.excepthook, lambda: setattr(threading, "excepthook", print)),
    "log levels": (
        lambda: logging.getLogger("lightning.pytorch.utilities.rank_zero").level,
        lambda: logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.CRITICAL),
    ),
    "environment": (lambda: os.environ.get("MIM_TEST"), lambda: os.environ.update(MIM_TEST="1")),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        lambda: torch.use_deterministic_algorithms(True),
    ),
}


@pytest.mark.parametrize(("look", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_what_is_changed_inside_is_put_back(look, change):
    before = look()
    with left_as_they_were():
        change()
        assert look() != before
    assert look() == before


@pytest.mark.parametrize(("look", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_it_is_put_back_after_an_error(look, change):
    before = look()

    def fail():
        with left_as_they_were():
            change()
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail()
    assert look() == before


def test_a_thread_which_may_set_no_handlers_can_use_it_too():
    failures = []

    def work():
        try:
            with left_as_they_were():
                pass
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []

"""What a run changes of the process that it is in: nothing, once it is over. A notebook goes on afterwards."""

import logging
import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from mim.distributed.processes import STOP_SIGNALS, leave_group

_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "tifffile")


@contextmanager
def left_as_they_were() -> Iterator[None]:
    """Puts back threads, random numbers, signal handlers, warnings, log levels, environment and torch's switches."""
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    with _random_numbers(), _signals(), _switches(), _environment(), warnings.catch_warnings():
        try:
            yield
        finally:
            if not grouped:
                leave_group()


@contextmanager
def _random_numbers() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what libraries draw from
    initialised = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's
    devices = range(torch.cuda.device_count()) if initialised else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _signals() -> Iterator[None]:
    """Handlers, which only the main thread may set."""
    hook = threading.excepthook
    numbers = (*STOP_SIGNALS, signal.SIGCHLD) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        threading.excepthook = hook
        for number, handler in handlers.items():
            if handler is not None:  # set by no Python code
                signal.signal(number, handler)


@contextmanager
def _switches() -> Iterator[None]:
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    exact = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    tuned = cudnn.benchmark, cudnn.deterministic
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(exact[0], warn_only=exact[1])
        cudnn.benchmark, cudnn.deterministic = tuned
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)

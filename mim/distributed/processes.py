"""This process among others: its rank before anything is set up, and how it leaves when it is asked to."""

import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What schedulers and people ask a run to stop with."""

INTERRUPTED = 75
"""Exit status of a run that a signal stopped and that can be resumed (EX_TEMPFAIL of sysexits.h: try again)."""

_STARTER = "MIM_STARTED_BY"
"""Environment variable in which a process leaves its id to those that it starts."""

_starter = 0
"""Id of the process of this run that started this one; 0 if none did."""

_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo raises in the other ranks after one has died; that one prints its own error."""

_PATIENCE = 10.0
"""Seconds that a rank which failed waits, so that the process which started it can exit first and print the error."""


def process_rank() -> int:
    """Rank that torchrun, Lightning or SLURM gave to this process; 0 if it is alone."""
    given = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((int(rank) for rank in given if rank is not None), 0)


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """Inside, a stop signal ends the program at once with status 75.

    For everything before and after a training: files are complete at any moment, so nothing has to be finished. A
    thread acts on the signal, since the main thread may be blocked in a collective whose other ranks never arrive.

    A process that another process of the run started passes the signal to its parent and exits when the parent has
    exited: a run has the exit status of rank 0.
    """
    global _starter
    _starter = starter = int(os.environ.get(_STARTER, 0))
    os.environ[_STARTER] = str(os.getpid())
    before = {number: signal.signal(number, _leave) for number in STOP_SIGNALS}
    arrivals, arriving = os.pipe()
    os.set_blocking(arriving, False)
    woken = signal.set_wakeup_fd(arriving, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(arrivals, starter), daemon=True).start()
    try:
        yield
    except Exception as error:  # print a bug here, or its traceback is lost; the death of another rank is its own error
        if starter and not any(words in str(error) for words in _GONE):
            traceback.print_exc()
        let_the_first_end()
        raise
    finally:
        signal.set_wakeup_fd(woken)
        os.close(arriving)
        for number, handler in before.items():
            signal.signal(number, handler)
        del os.environ[_STARTER]


def let_the_first_end() -> None:
    """Delays the exit of a process that another rank started: if it exits first, the launcher kills rank 0."""
    if _starter:
        time.sleep(_PATIENCE)


def leave_group() -> None:
    """Leaves the group of processes if there is one: its threads would outlive the interpreter, which then aborts."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _leave(number: int, frame: FrameType | None) -> None:
    """Waits for :func:`_watch`, which acts: it must find this handler before a training puts its own in the place."""
    time.sleep(1)


def _watch(arrivals: int, starter: int) -> None:
    """Acts on every signal that Python notes, as its number comes through the pipe, until the pipe is closed."""
    while not starter or os.getppid() == starter:
        if not select.select([arrivals], [], [], 1)[0]:
            continue
        number = os.read(arrivals, 1)
        if not number:
            os.close(arrivals)
            return
        if signal.getsignal(number[0]) is not _leave:
            continue
        if not starter:
            break
        with suppress(ProcessLookupError):
            os.kill(starter, number[0])
    os._exit(INTERRUPTED)

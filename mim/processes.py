"""This process among others: its rank before anything is set up, and how it leaves when it is asked to."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What schedulers and people ask a run to stop with."""

INTERRUPTED = 75
"""Exit status of a run that a signal stopped and that can be resumed (EX_TEMPFAIL of sysexits.h: try again)."""


def process_rank() -> int:
    """Rank that torchrun, Lightning or SLURM gave to this process; 0 if it is alone."""
    given = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((int(rank) for rank in given if rank is not None), 0)


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """Inside, a stop signal ends the program at once with status 75.

    For everything around a training: what is on the disk is whole at any moment, so there is nothing to wait for.
    """
    before = {number: signal.signal(number, _leave) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(INTERRUPTED)

"""Loader processes that are watched: when one of them dies or hangs, the file that it was reading is known."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from mim.data.files import NothingReadableError
from mim.errors import MachineError

STALL = 120
"""Seconds after which a loader process that delivers nothing ends the run instead of hanging it."""

_LONGEST_NAME = 1024


def loader_processes(given: int | None) -> int:
    """Loader processes: as many as given, or one per core, at most 16."""
    return min(16, len(os.sched_getaffinity(0))) if given is None else given


class WatchedLoader(DataLoader[Any]):
    """A loader whose processes outlive the signals that stop a run, never hang for ever, and note what they read.

    Args:
        dataset: what is loaded; it reads files inside of :func:`reading`.
        num_workers: loader processes.
        settings: further arguments of torch's loader.
    """

    in_use: ClassVar["WeakSet[WatchedLoader]"] = WeakSet()

    def __init__(self, dataset: Dataset[Any], num_workers: int = 0, **settings: Any) -> None:  # noqa: ANN401 - torch's
        # A row for each process, shared with it: its number, and the name of the file in its hands.
        self.pids = torch.zeros(num_workers, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self.names = torch.zeros(num_workers, _LONGEST_NAME, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        begin = partial(_begin, self.pids, self.names)
        timeout = STALL if num_workers else 0
        super().__init__(dataset, num_workers=num_workers, timeout=timeout, worker_init_fn=begin, **settings)
        self.in_use.add(self)

    def __iter__(self) -> Any:  # noqa: ANN401 - torch's own, which no name of its is public for
        """Batches; the death of a process is heard of at once."""
        # torch sets its handler for that once, and after each training Lightning puts back what it had found.
        if signal.getsignal(signal.SIGCHLD) in (signal.SIG_DFL, signal.SIG_IGN):
            signal_handling._SIGCHLD_handler_set = False
        others = set(multiprocessing.active_children())
        batches = super().__iter__()
        _own.update(process.pid for process in set(multiprocessing.active_children()) - others)
        return batches

    def in_hands(self) -> Iterator[tuple[int, str]]:
        """Number of each process, and the file that it reads or read last before it died; empty between two files."""
        for pid, name in zip(self.pids.tolist(), self.names.numpy(), strict=True):
            yield pid, name.tobytes().rstrip(b"\0").decode(errors="replace")


class EndlessLoader(WatchedLoader):
    """A loader without a length: Lightning then counts no epochs, and steps alone say where the run is."""

    def __len__(self) -> int:
        """There is none."""
        raise TypeError("a loader of one long pass has no length")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Notes the file that this process has in its hands, if it is a loader's."""
    if _row is None:
        yield
        return
    text = name.encode(errors="replace")[:_LONGEST_NAME]
    _row[: len(text)] = np.frombuffer(text, np.uint8)
    try:
        yield
    finally:
        _row[: len(text)] = 0


def loader_failure(error: Exception, hint: str | None = None) -> MachineError | None:
    """A loader process that died, hung, or found no image; None if the error tells of anything else.

    The first two are told with the file that the process had in its hands, and end the other processes.

    Args:
        error: what was raised.
        hint: what to try then; by default the same again for images that are gone, fewer processes otherwise.
    """
    text = str(error).strip().rstrip(".")
    if isinstance(error, NothingReadableError):  # behind a traceback, if it comes out of a loader process
        found = text.rpartition(f"{NothingReadableError.__name__}: ")[2]
        why = "a disk or a network share that is gone looks like that"
        return MachineError(found, why=why, hint=hint or "the same command once they can be read", alone=True)
    stalled, died = (text.startswith(f"DataLoader {what}") for what in ("timed out", "worker (pid"))
    if not (stalled or died or isinstance(error, EOFError | ConnectionError)):  # the latter two: in mid-sentence
        return None
    alive = {process.pid for process in multiprocessing.active_children()}
    rows = [row for loader in WatchedLoader.in_use for row in loader.in_hands()]
    files = sorted({name for pid, name in rows if name and (stalled or pid not in alive)})
    _end_all()
    what = f"a loader process gave nothing for {STALL} s" if stalled else "a loader process died"
    return MachineError(
        what + (f" while it read {', '.join(files)}" if files else ""),
        why=f"torch says: {text or type(error).__name__}",
        hint=hint or "fewer --num_workers, if memory was short",
        alone=True,
    )


@atexit.register
def _end_all() -> None:
    """Ends what is left: loader processes do not listen to the signal with which Python asks them to leave."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each of them
    for process in multiprocessing.active_children():
        if process.pid in _own:  # a program around us may have processes, too
            process.kill()


_own: set[int | None] = set()
"""Ids of the loader processes that were started."""


_row: NDArray[np.uint8] | None = None
"""Of :attr:`WatchedLoader.names`, in a loader process."""


def _begin(pids: Tensor, names: Tensor, worker: int) -> None:
    """Prepares a loader process: the run still needs it for the step that it finishes after a signal, before it saves.

    Schedulers and Ctrl-C send theirs to all processes of a run. A loader process ends with its parent in any case.
    """
    global _row
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    _row, pids[worker] = names[worker].numpy(), os.getpid()

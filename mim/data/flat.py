"""Indices of large data sets, which all processes of a run read in the same memory.

A forked process has the memory of the one that forked it. One that is started anew, as on macOS and by default since
Python 3.14, is sent all that it works on; of what is kept here it gets an open file without a name, and maps it.
"""

import mmap
import os
import tempfile
from collections.abc import Iterable, Sequence
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import IO, Any, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

SMALL = 1 << 16
"""Bytes that are sent as they are: a mapping takes whole pages, and a file for each process."""


class FlatArray(np.ndarray[Any, Any]):
    """An array of numbers that processes share, and otherwise like any other.

    Args:
        values: they are copied unless they are an array already.
    """

    _file: IO[bytes] | None

    def __new__(cls, values: ArrayLike) -> "FlatArray":
        """See the class."""
        return np.ascontiguousarray(values).view(cls)

    def __array_finalize__(self, whole: object) -> None:
        """A part or a copy has no file."""
        self._file = None

    def __reduce_ex__(self, protocol: object) -> Any:  # noqa: ANN401 - pickle's
        """The numbers; for a process that is being started, a file that holds them."""
        if get_spawning_popen() is None or self.nbytes < SMALL:
            return FlatArray, (np.array(self),)
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as processes may be started
            self.tofile(self._file)
            self._file.flush()
        return _mapped, (DupFd(self._file.fileno()), self.dtype.str, self.shape)


class Labels(list[int]):
    """Labels of images, which arrive as :class:`FlatLabels` in a process that is being started."""

    _flat: FlatArray | None = None

    def __reduce_ex__(self, protocol: object) -> Any:  # noqa: ANN401 - pickle's
        """The labels, flat if they are for such a process."""
        if get_spawning_popen() is None:
            return Labels, (list(self),)
        if self._flat is None or len(self._flat) != len(self):
            self._flat = FlatArray(self)  # kept, as its file has to be open when the process starts
        return FlatLabels, (self._flat,)


class FlatLabels(Sequence[int]):
    """Numbers one after the other.

    Args:
        numbers: ``(N,)``.
    """

    def __init__(self, numbers: NDArray[np.int64]) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        """How many there are."""
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        """One of them, or some."""
        return cast(int | list[int], self._numbers[index].tolist())


class Strings:
    """Strings in one buffer: a million paths cost their bytes, and reading one changes no reference count.

    Args:
        strings: such as file names may be.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = FlatArray(np.frombuffer(b"".join(encoded), np.uint8))
        self._ends = FlatArray(np.cumsum([0, *map(len, encoded)], dtype=np.int64))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        """One of them."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start, end = self._ends[index : index + 2].tolist()
        return os.fsdecode(self._bytes[start:end].tobytes())


def _mapped(handle: Any, kind: str, shape: tuple[int, ...]) -> FlatArray:  # noqa: ANN401 - multiprocessing's
    """The numbers in a file that another process has opened."""
    with open(handle.detach(), "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return FlatArray(np.frombuffer(memory, np.dtype(kind)).reshape(shape))

"""Arrays that are written row by row and never lie in memory: ``.npy`` and ``.safetensors``, read by anybody."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

ArrayFormat = Literal["safetensors", "npy"]

_HEADER = 512
"""Bytes kept free for the header of a safetensors file, which names the number of rows and so is written last."""


class RowWriter:
    """A file with one array ``(rows, *shape)`` in it; it is at its place when everything is written, or not at all.

    Args:
        file: ends in ``.npy`` or ``.safetensors``.
        name: of the tensor in a safetensors file.
        shape: of a row.
        dtype: ``float32`` or ``float16``.

    Attributes:
        rows: written so far.
    """

    def __init__(self, file: Path, name: str, shape: tuple[int, ...], dtype: Literal["float32", "float16"]) -> None:
        self.file, self.name, self.shape, self.dtype, self.rows = file, name, shape, np.dtype(dtype), 0
        self._aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")

    def __enter__(self) -> "RowWriter":
        """Opens a file beside the place."""
        self._open = self._aside.open("wb")
        self._head()
        return self

    def write(self, rows: NDArray[np.float32]) -> None:
        """Appends ``(B, *shape)``."""
        assert rows.shape[1:] == self.shape, f"{rows.shape} are no rows of {self.shape}"
        self._open.write(np.ascontiguousarray(rows, self.dtype.newbyteorder("<")).tobytes())
        self.rows += len(rows)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        """Puts the file in its place, or removes it after an error."""
        try:
            if kind is None:
                self._open.seek(0)
                self._head()
                self._open.close()
                os.replace(self._aside, self.file)
        finally:
            self._open.close()
            self._aside.unlink(missing_ok=True)

    def _head(self) -> None:
        """Writes the header, as long for any number of rows."""
        if self.file.suffix == ".npy":
            descr = np.lib.format.dtype_to_descr(self.dtype.newbyteorder("<"))
            header = {"descr": descr, "fortran_order": False, "shape": (self.rows, *self.shape)}
            np.lib.format.write_array_header_1_0(self._open, header)  # NumPy leaves room for the first axis to grow
            return
        size = self.rows * int(np.prod(self.shape)) * self.dtype.itemsize
        kind = {"float32": "F32", "float16": "F16"}[self.dtype.name]
        tensor = {"dtype": kind, "shape": [self.rows, *self.shape], "data_offsets": [0, size]}
        text = json.dumps({self.name: tensor}).encode().ljust(_HEADER)
        self._open.write(len(text).to_bytes(8, "little") + text)

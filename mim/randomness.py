"""Random numbers as a function of what they are for, so that no generator state is ever saved.

Sample order, crops and masks depend on (seed, epoch, sample) or (seed, step, position in the global batch), never
on the worker, the rank or what was drawn before. Resuming, other worker counts and other world sizes then give the same
numbers.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's increment, as the signed integer that torch has


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed for a key such as ``(seed, "crop", epoch, index)``; another key gives an unrelated seed."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh ``torch.Generator`` that depends on ``key`` alone."""
    return torch.Generator(device).manual_seed(derive_seed(*key))


@contextmanager
def keyed_libraries(*key: int | str) -> Iterator[None]:
    """For libraries that draw from the global generators of Python and NumPy: inside, these depend on ``key`` alone."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what timm draws from
    random.seed(derive_seed(*key))
    np.random.seed(derive_seed(*key, "numpy") % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class RowGenerator:
    """Uniform numbers for a batch in which every row has its own key.

    Row ``b`` draws the same numbers whatever else is in the batch, so a global batch may be cut into ranks and
    micro-batches at will. Counter based: numbers are hashes of (key, counter), computed on the keys' device.

    Args:
        keys: ``(B,)`` int64, one key per row.
        seed: of the numbers that all rows share, see :meth:`common`.
    """

    def __init__(self, keys: Tensor, seed: int = 0) -> None:
        self.keys, self.seed = keys, seed
        self._draws = self._commons = 0

    @classmethod
    def for_rows(cls, seed: int, first: int, count: int, device: torch.device | str | None = None) -> "RowGenerator":
        """Rows ``first .. first + count`` of the stream that ``seed`` names."""
        rows = torch.arange(first, first + count, device=device)
        return cls(_mix(rows + (seed & 0x7FFFFFFFFFFFFFFF)), seed)

    @property
    def device(self) -> torch.device:
        """Where numbers are drawn."""
        return self.keys.device

    def __len__(self) -> int:
        """Rows of the batch."""
        return len(self.keys)

    def views(self, count: int) -> "RowGenerator":
        """A fresh generator for ``count`` views of every row, view after view: ``count * B`` rows."""
        return RowGenerator(torch.cat([_mix(self.keys ^ (view + 1)) for view in range(count)]), self.seed)

    def common(self, count: int) -> list[float]:
        """Numbers on [0, 1) that all rows share, in every part of a batch that was cut; every call gives new ones."""
        seeds = [derive_seed(self.seed, "common", self._commons + number) for number in range(count)]
        self._commons += count
        return [(seed >> 10) / (1 << 53) for seed in seeds]

    def rand(self, *shape: int) -> Tensor:
        """``(B, *shape)`` float32, uniform on [0, 1); every call gives new numbers."""
        count = int(torch.Size(shape).numel())
        counter = torch.arange(count, device=self.keys.device)
        start = (self._draws * _GAMMA + (1 << 63)) % (1 << 64) - (1 << 63)  # wraps as int64 does
        self._draws += count
        bits = _mix(self.keys[:, None] + (counter * _GAMMA + start))  # (B, count)
        return ((bits >> 40) & 0xFFFFFF).float().div(1 << 24).view(len(self.keys), *shape)

    def randn(self, *shape: int) -> Tensor:
        """``(B, *shape)`` float32, normal with deviation 1; every call gives new numbers."""
        count = int(torch.Size(shape).numel())
        share, turn = self.rand(2, (count + 1) // 2).unbind(1)
        radius = (-2 * (1 - share).log()).sqrt()  # Box and Muller; 1 - share is never 0
        angle = 2 * math.pi * turn
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return both[:, :count].reshape(len(self.keys), *shape)


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele et al., OOPSLA 2014) on int64, whose products wrap as unsigned ones do."""
    x = x + _GAMMA
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

"""How many patch tokens go on after each block: plain whole numbers, known before the first image."""

import inspect
from collections.abc import Sequence
from fractions import Fraction
from typing import Any


class Schedule:
    """How far the sequence is shortened at each block. Blocks are counted from 0."""

    def left(self, patches: int, layer: int, depth: int) -> int:
        """Patch tokens that should be left after a block.

        Args:
            patches: how many there are before it; prefix tokens are not counted.
            layer: number of the block.
            depth: blocks of the model.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        """The call that builds it."""
        return call_of(self)


class KeepRate(Schedule):
    """Keeps a share of the tokens at a few blocks, the schedule of EViT and DynamicViT.

    Args:
        keep: share that each of these blocks keeps, rounded up, in (0, 1].
        at: numbers of the blocks; a quarter, a half and three quarters of the way unless given (3, 6, 9 of 12).
    """

    def __init__(self, keep: float, at: Sequence[int] | None = None) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep {keep} is outside (0, 1]")
        self.keep, self.at = keep, None if at is None else tuple(at)
        # 0.07 * 100 is 7.000000000000001 in floats, whose ceiling is 8: the decimal that was written is meant.
        self._ratio = Fraction(str(keep)).as_integer_ratio()

    def left(self, patches: int, layer: int, depth: int) -> int:
        """``ceil(keep * patches)`` at the chosen blocks, all elsewhere."""
        sites = (depth // 4, depth // 2, 3 * depth // 4) if self.at is None else self.at
        numerator, denominator = self._ratio
        return -(-numerator * patches // denominator) if layer in sites else patches


class PerBlock(Schedule):
    """Takes away about the same number of tokens at every block, the schedule of ToMe and Cropr.

    Args:
        r: tokens per block.
        inflect: share of ``r`` that the first block is short of and the last one exceeds, linear in between; 0 is
            constant, 1 falls from nothing to ``2 r``, -1 begins with ``2 r`` and ends with nothing.
        stop: blocks at the end that take nothing.
    """

    def __init__(self, r: int, inflect: float = 0.0, stop: int = 0) -> None:
        if r < 0 or not -1 <= inflect <= 1 or stop < 0:
            raise ValueError(f"need r >= 0, -1 <= inflect <= 1 and stop >= 0, not {r}, {inflect} and {stop}")
        self.r, self.inflect, self.stop = r, inflect, stop

    def left(self, patches: int, layer: int, depth: int) -> int:
        """``patches`` less this block's number, never below 1."""
        if layer >= depth - self.stop:
            return patches
        first = int(self.r * (1 - self.inflect))
        slope = (2 * self.r - 2 * first) / max(depth - 1, 1)
        return max(1, patches - int(first + slope * layer + 1e-9))


class Counts(Schedule):
    """Any other schedule, number by number.

    Args:
        counts: patch tokens that are left after each block, never more than after the one before it; a number that
            is larger than what there is changes nothing.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        if min(counts, default=0) < 1:
            raise ValueError(f"every block must leave at least one token, not {list(counts)}")
        self.counts = tuple(counts)

    def left(self, patches: int, layer: int, depth: int) -> int:
        """The number that was given for this block."""
        if len(self.counts) != depth:
            raise ValueError(f"the schedule names {len(self.counts)} blocks, the model has {depth}")
        return min(patches, self.counts[layer])


def call_of(part: object) -> str:
    """The call that builds a part of a reduction."""
    return f"{type(part).__name__}({', '.join(f'{name}={value!r}' for name, value in _settings(part).items())})"


def config_of(part: object) -> dict[str, Any]:
    """The same as data, a class path with its arguments as in the configs of a run."""
    return {
        "class_path": f"mim.reduction.{type(part).__name__}",
        "init_args": {name: _plain(value) for name, value in _settings(part).items()},
    }


def _settings(part: object) -> dict[str, Any]:
    """Every part of a reduction keeps the arguments of its constructor under their names."""
    known = inspect.signature(type(part)).parameters.values()
    return {each.name: getattr(part, each.name) for each in known if each.kind is each.POSITIONAL_OR_KEYWORD}


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return value if value is None or isinstance(value, bool | int | float | str) else config_of(value)

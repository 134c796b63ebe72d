"""The scale of a data set, and mean and deviation on it, measured on a keyed sample before the first step."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim.data.images import ImageError
from mim.data.pixels import Pixels
from mim.data.sources import Source
from mim.randomness import keyed_generator
from mim.terminal import progress

SAMPLE = 2000
"""Images that are measured, at most."""
PIXELS = 2048
"""Pixels of each that count, drawn by its number."""
PERCENTILES = (0.1, 99.9)
"""Of all values; below and above lie dead and hot pixels, glints and mistakes."""


@dataclass(frozen=True)
class Measured:
    """What was found.

    Args:
        pixels: the scale, complete.
        mean: per channel, of values on that scale.
        std: as ``mean``; 1 for a channel that is the same everywhere.
        values: the two percentiles of the numbers in the files.
        images: how many were measured.
        missing: share of their pixels that were not measured.
    """

    pixels: Pixels
    mean: list[float]
    std: list[float]
    values: tuple[float, float]
    images: int
    missing: float = 0.0

    def line(self) -> str:
        """In words, with the option that fixes the scale."""
        low, high = self.pixels.low, self.pixels.high
        scale = (
            f"scaled by {short(high[0])}" if low == (0.0,) else f"{short(low[0])} becomes 0, {short(high[0])} becomes 1"
        )
        if self.pixels.log:
            scale = f"on a logarithmic scale from {short(low[0])} to {short(high[0])}"
        if len(low) > 1:
            scale = "each channel on a scale of its own"
        kind = "numbers of several types" if self.pixels.type == "any" else self.pixels.type
        missing = f", {self.missing:.1%} of the pixels nodata" if self.missing else ""
        return (
            f"values {short(self.values[0])}..{short(self.values[1])} in {kind}, {scale}; "
            f"mean {spread(self.mean)} std {spread(self.std)}, measured on {self.images:,} images{missing}; "
            f"fix with --value_range {option(self.pixels)}"
        )


def measure(source: Source, channels: int, pixels: Pixels, seed: int, found: bool = True) -> Measured:
    """Measures a data set.

    Args:
        source: reads files as ``pixels`` says.
        channels: of the images.
        pixels: type, bands, nodata and clipping; its range, too, unless it is to be found.
        seed: of the sample.
        found: whether the range is to be found.

    Raises:
        ValueError: if none of the images can be read.
    """
    order = torch.randperm(len(source), generator=keyed_generator(seed, "value range"))[:SAMPLE].tolist()
    with ThreadPoolExecutor() as threads:  # decoding releases the interpreter lock
        parts = threads.map(lambda index: _draw(source, index), sorted(order))
        bar = progress(parts, len(order), "measuring values")
        samples = [part for part in bar if part is not None]
    if not samples:
        raise ValueError("no image can be read")
    values = np.concatenate(samples, axis=1)  # (C, pixels)
    known = values[:, ~np.isnan(values[0])]
    if not known.size:
        raise ValueError("no pixel was measured")
    ends = percentiles(known)
    if found:
        low, high = value_range(known, ends, pixels.type, pixels.log)
        pixels = replace(pixels, low=(low,), high=(high,))
    mean, std = statistics(known, pixels)
    return Measured(pixels, mean, std, ends, len(samples), 1 - known.shape[1] / values.shape[1])


def percentiles(values: NDArray[Any]) -> tuple[float, float]:
    """The two percentiles of all values."""
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(high)


def value_range(values: NDArray[Any], ends: tuple[float, float], kind: str, log: bool = False) -> tuple[float, float]:
    """What becomes 0 and 1: 0 and the upper percentile of unsigned numbers, both percentiles of others.

    Where these are one number, the smallest and largest of all; where even these are, that number and the next.
    On a logarithmic scale both percentiles of what lies above 0.
    """
    if log:
        positive = values[values > 0]
        if not positive.size:
            raise ValueError("no number lies above 0, so that none has a logarithm")
        return value_range(positive, percentiles(positive), "float32")
    low, high = (0.0, ends[1]) if kind.startswith("uint") else ends
    if not low < high:
        low, high = (0.0 if kind.startswith("uint") else float(values.min())), float(values.max())
    # Single precision, in which images are scaled, must still tell them apart.
    return (low, high) if high - low > 1e-6 * max(1e-30, abs(low), abs(high)) else (low, low + max(1.0, abs(low)))


def statistics(values: NDArray[Any], pixels: Pixels) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel of ``(C, M)`` numbers on the scale of ``pixels``."""
    low, high = (np.array(end, np.float64)[:, None] for end in pixels.ends(len(values)))
    numbers = values.astype(np.float64)
    if pixels.log:
        scaled = np.log(np.maximum(numbers, low) / low) / np.log(high / low)
    else:
        scaled = (numbers - low) / (high - low)
    scaled = scaled.clip(0, 1) if pixels.clip else scaled
    std = scaled.std(axis=1)
    mean = [float(f"{value:.6g}") for value in scaled.mean(axis=1)]
    return mean, [float(f"{value:.6g}") if value > 1e-6 else 1.0 for value in std]


def option(pixels: Pixels) -> str:
    """The range as ``--value_range`` takes it, and ``--log_values`` if that belongs to it."""
    pairs = [f"{short(a)},{short(b)}" for a, b in zip(pixels.low, pixels.high, strict=True)]
    ends = pairs[0] if len(pairs) == 1 else "[" + ",".join(f"[{pair}]" for pair in pairs) + "]"
    return f"{ends} --log_values" if pixels.log else ends


def short(number: float) -> str:
    """Six digits at most, whole numbers whole."""
    return f"{number:.0f}" if float(number).is_integer() and abs(number) < 1e9 else f"{number:.6g}"


def spread(numbers: Sequence[float]) -> str:
    """Two digits each, of many channels the smallest and the largest."""
    if len(numbers) > 4:
        return f"{min(numbers):.2g} to {max(numbers):.2g}"
    return " ".join(f"{number:.2g}" for number in numbers)


def _draw(source: Source, index: int) -> NDArray[np.float32] | None:
    """``(C, PIXELS)`` of an image, NaN where nothing was measured; None if it cannot be read."""
    try:
        image: Tensor = source.read(index)
    except ImageError:
        return None
    flat = image.flatten(1)
    if flat.shape[1] > PIXELS:
        flat = flat[:, torch.randint(flat.shape[1], (PIXELS,), generator=keyed_generator("pixels", index))]
    return flat.float().numpy()

"""How the numbers of a data set are distributed, for the report: a histogram per channel of some images."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mim.data.images import ImageError
from mim.data.pixels import Pixels
from mim.data.sources import Source

IMAGES, BINS = 16, 64
SHOWN = 8  # channels


@dataclass(frozen=True)
class Levels:
    """What was found in some images spread over the set.

    Args:
        low: left end of the histogram, in numbers of the files.
        high: its right end.
        shares: per channel, the share of the pixels in each of its bins; the first channels only.
        distinct: different numbers per channel.
        outside: share of the numbers below what becomes 0, or above what becomes 1.
        missing: share of the pixels that were not measured.
        images: how many were looked at.
    """

    low: float
    high: float
    shares: list[list[float]]
    distinct: list[int]
    outside: float
    missing: float
    images: int

    def facts(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        return asdict(self)


def levels(source: Source, pixels: Pixels) -> Levels | None:
    """Looks at a few images; None if none of them can be read."""
    images = []
    for index in sorted({i * len(source) // IMAGES for i in range(IMAGES)}):
        try:
            images.append(source.read(index).flatten(1)[:, :1_000_000].float().numpy())  # (C, pixels)
        except ImageError:
            continue
    if not images:
        return None
    values = np.concatenate(images, axis=1)
    known = values[:, ~np.isnan(values[0])].astype(np.float64)
    if not known.size:
        return None
    starts, ends = (np.array(end)[:, None] for end in pixels.ends(len(known)))
    low, high = min(known.min(), starts.min()), max(known.max(), ends.max())
    counts = [np.histogram(channel, BINS, (low, high))[0] / known.shape[1] for channel in known[:SHOWN]]
    return Levels(
        low=float(low),
        high=float(high),
        shares=[[round(float(share), 5) for share in channel] for channel in counts],
        distinct=[len(np.unique(channel)) for channel in known[:SHOWN]],
        outside=round(float(((known < starts) | (known > ends)).mean()), 5),
        missing=round(1 - known.shape[1] / values.shape[1], 5),
        images=len(images),
    )

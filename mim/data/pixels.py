"""What the numbers in image files mean: one scale for all files of a data set, never one per file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import yaml

from mim.errors import UserError

PixelType = Literal["per_file", "uint8", "uint16", "int16", "float32", "any"]
"""What files hold; ``per_file`` scales each to 8 bit by itself, as runs did that have no ``value_range``."""


@dataclass(frozen=True)
class Pixels:
    """The scale of a data set: ``x = (v - low) / (high - low)`` for a number ``v`` in a file, or its logarithm.

    Args:
        low: number that becomes 0; one for all channels or one for each.
        high: number that becomes 1, likewise.
        type: of the files' numbers. A set of ``uint8`` scales its files of other types to 8 bit, one by one; a set of
            another type refuses what is not of it; ``any`` takes all numbers as they are.
        clip: keep ``x`` within 0 and 1.
        bands: channels to read, counted from 1, in this order; all if empty.
        nodata: number that stands for "not measured", besides NaN and what a file itself names.
        log: ``x = log(max(v, low) / low) / log(high / low)`` instead, with ``low`` above 0.
    """

    low: tuple[float, ...] = (0.0,)
    high: tuple[float, ...] = (255.0,)
    type: PixelType = "uint8"
    clip: bool = False
    bands: tuple[int, ...] = ()
    nodata: float | None = None
    log: bool = False

    @property
    def colours(self) -> bool:
        """Whether three channels are red, green and blue of 8 bit, as far as anybody knows."""
        return self.eight_bit and not self.bands and not self.log

    @property
    def eight_bit(self) -> bool:
        """Whether images arrive in 8 bit."""
        return self.type in ("uint8", "per_file")

    @property
    def pictures(self) -> bool:
        """Whether images are meant to be looked at as they are: 8 bit, black to white."""
        return self.colours and (self.low, self.high) == ((0.0,), (255.0,))

    @property
    def bounded(self) -> bool:
        """Whether nothing lies beyond 0 and 1."""
        return self.clip or (self.eight_bit and (self.low, self.high) == ((0.0,), (255.0,)))

    def stored(self, x: Any, low: Any, high: Any) -> Any:  # noqa: ANN401 - numbers or tensors
        """The number in a file that becomes ``x``."""
        return low * (high / low) ** x if self.log else low + (high - low) * x

    def ends(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """``low`` and ``high`` of each channel.

        Raises:
            UserError: if there is a range for each of another number of channels.
        """
        if len(self.low) not in (1, channels):
            raise UserError(
                f"--value_range has {len(self.low)} ranges, images have {channels} channels",
                hint="--value_range auto   or   --value_range LOW,HIGH for all channels",
            )
        times = channels // len(self.low)
        return self.low * times, self.high * times

    def facts(self) -> dict[str, Any]:
        """As plain types, for JSON; :meth:`of` reads them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def options(self) -> dict[str, Any]:
        """As settings of a data set, which then reads its files like this."""
        pairs = [list(pair) for pair in zip(self.low, self.high, strict=True)]
        ends = "per_file" if self.type == "per_file" else pairs[0] if len(pairs) == 1 else pairs
        type_ = None if self.type == "per_file" else self.type
        bands = list(self.bands) or None
        own = {"clip": self.clip, "bands": bands, "nodata": self.nodata, "log_values": self.log}
        return {"value_range": ends, "pixel_type": type_} | own

    @classmethod
    def of(cls, facts: object) -> "Pixels":
        """What :meth:`facts` wrote; 8 bit if there is nothing, raises ValueError if it is something else."""
        if facts is None:
            return cls()
        if not isinstance(facts, dict) or facts.get("type", "uint8") not in get_args(PixelType):
            raise ValueError(f"{facts!r:.100} is no scale of pixels")
        low, high = (
            tuple(float(v) for v in facts.get(end, default)) for end, default in (("low", [0]), ("high", [255]))
        )
        log = bool(facts.get("log"))
        check_range(low, high, log)
        nodata, bands = facts.get("nodata"), tuple(int(band) for band in facts.get("bands", ()))
        missing = None if nodata is None else float(nodata)
        return cls(low, high, facts.get("type", "uint8"), bool(facts.get("clip")), bands, missing, log)

    def exported(self, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
        """Mean, deviation and scale for a timm folder.

        timm's transforms divide 8 bit by 255, so there the statistics are told on that scale, whatever the range.
        """
        shown, stats = self, (list(mean), list(std))
        if self.eight_bit and not self.clip and not self.log:
            low, high = self.ends(len(mean))
            if set(low + high) != {0.0, 255.0}:
                spans = [(a / 255, (b - a) / 255) for a, b in zip(low, high, strict=True)]
                moved = [a + span * value for (a, span), value in zip(spans, mean, strict=True)]
                stats = moved, [span * value for (_, span), value in zip(spans, std, strict=True)]
            shown = replace(self, low=(0.0,), high=(255.0,), type="uint8")
        return {"mean": stats[0], "std": stats[1], "pixels": None if shown == EIGHT_BIT else shown.facts()}


EIGHT_BIT = Pixels()
"""Pictures: 8 bit, 0 to 255."""
AS_STORED = Pixels(type="any")
"""Numbers of whatever type, before their scale is known."""


def check_range(low: Sequence[float], high: Sequence[float], log: bool = False) -> None:
    """Raises ValueError unless all ends are finite, each ``low`` below its ``high``, and above 0 for logarithms."""
    finite = all(abs(value) < 1e38 for value in (*low, *high))  # NaN compares false, too
    if len(low) != len(high) or not low or not finite or not all(a < b for a, b in zip(low, high, strict=True)):
        raise ValueError(
            f"{[*map(list, zip(low, high, strict=False))]} is no range of values: low,high with low < high"
        )
    if log and not all(a > 0 and b < 1e30 * a for a, b in zip(low, high, strict=True)):
        raise ValueError(f"{min(low):g} is no low end of a logarithmic range, which begins above 0")


def parse_range(given: object, log: bool = False) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """``low`` and ``high`` of ``0,4095``, ``[0, 4095]`` or ``[[0, 1], [-30, 5]]``; None for ``auto`` and ``per_file``.

    Raises:
        UserError: for anything else, and for what has no logarithm where it is wanted.
    """
    if log and given == "per_file":
        raise UserError("--log_values and --value_range per_file exclude each other", hint="--value_range auto")
    if given in ("auto", "per_file"):
        return None
    try:
        rows: Any = yaml.safe_load(f"[{given.strip(' ()')}]") if isinstance(given, str) else given
        rows = rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows
        pairs = list(rows) if isinstance(rows[0], list | tuple) else [rows]
        low, high = zip(*(tuple(float(number) for number in pair) for pair in pairs), strict=True)
        check_range(low, high)
    except (ValueError, TypeError, IndexError, yaml.YAMLError) as error:
        raise UserError(
            f"--value_range {given} is no range",
            why="it is the number that becomes 0 and the one that becomes 1, of all channels or of each",
            hint="--value_range 0,4095   or   --value_range [[0,1],[-30,5]]   or   --value_range auto",
        ) from error
    try:
        check_range(low, high, log)
    except ValueError as error:
        raise UserError(
            f"--log_values needs a --value_range above 0, not {given}",
            why="what lies below its low end counts as that, and 0 has no logarithm",
            hint="--value_range auto --log_values",
        ) from error
    return low, high


def canonical_range(text: str) -> str:
    """``[0.0, 4095.0]`` for ``0,4095``; what is no plain pair stays as it is."""
    try:
        low, high = (float(number) for number in text.strip("[]() ").split(","))
    except ValueError:
        return text
    return str([low, high])


def parse_bands(given: object) -> tuple[int, ...]:
    """Channel numbers from ``4,3,2`` or a list."""
    if not given and given != 0:
        return ()
    numbers: Any = given.strip("[]() ").split(",") if isinstance(given, str) else given
    try:
        bands = tuple(int(number) for number in (numbers if isinstance(numbers, list) else [numbers]))
        if not all(1 <= band <= 4096 for band in bands):
            raise ValueError(bands)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--bands {given} is no list of channels", why="they count from 1", hint="--bands 4,3,2"
        ) from error
    return bands

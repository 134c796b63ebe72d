"""Line charts as inline SVG: axes, ticks, tooltips, no script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mim.report.markup import Html, number, percent, tag
from mim.report.record import Points

POINTS = 160  # of a curve; more would be finer than one sees
DOTS = 30  # up to so many points are drawn as dots too
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 220, 46, 10, 10, 34


@dataclass(frozen=True)
class Axis:
    """Maps the span of ``ticks`` to pixels.

    Args:
        ticks: marks in rising order.
        start: pixel of the first one.
        end: pixel of the last one.
    """

    ticks: Sequence[float]
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0]) * (self.end - self.start)


def chart(
    title: str,
    lines: dict[str, Points],
    epochs_per_step: float | None,
    unit: str = "",
    from_zero: bool = False,
    across: str | None = None,
) -> Html:
    """A line chart over the epochs, or over what ``across`` names; empty if nothing finite was measured.

    An accuracy that was measured at step 0 is dotted on at that height: it is what the untrained encoder reaches.
    Long lines show the mean of neighbouring steps in front of their range; a gap is where a value was not finite.
    """
    factor = 100.0 if unit == "%" else 1.0
    thinned = {name: thin(points * [epochs_per_step or 1, factor]) for name, points in lines.items()}
    thinned = {name: points for name, points in thinned.items() if np.isfinite(points[:, 1]).any()}
    if not thinned:
        return Html("")
    every = np.concatenate(list(thinned.values()))
    bottom, top = float(np.nanmin(every[:, 2])), float(np.nanmax(every[:, 3]))
    y = Axis(nice_ticks(min(bottom, 0) if from_zero else bottom, top), HEIGHT - BOTTOM, TOP)
    x = Axis([every[:, 0].min(), max(every[:, 0].max(), every[:, 0].min() + 1e-9)], LEFT, WIDTH - RIGHT)
    drawn = [draw_line(points, f"s{i}", x, y, unit) for i, points in enumerate(thinned.values(), start=1)]
    unit_of_time = across or ("epoch" if epochs_per_step else "step")
    power = tens(y.ticks)
    shown_unit = unit or (f"10{str(power).translate(SUPERSCRIPTS)}" if power else "")
    svg = tag(
        "svg",
        *draw_axes(x, y, unit_of_time, 10.0**power),
        *drawn,
        *hover(thinned, x, unit, unit_of_time),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}, {', '.join(thinned)}",
    )
    return tag("figure", tag("figcaption", title, tag("small", f" {shown_unit}")), legend(thinned, unit), svg)


def thin(points: Points) -> Points:
    """``(M, 2)`` to at most ``POINTS`` rows ``(x, mean, least, greatest)`` of neighbours; NaN if one is."""
    points = np.where(np.abs(points) < 1e100, points, np.nan)
    groups = np.array_split(points, min(POINTS, len(points)))
    return np.array([(*group.mean(0), group[:, 1].min(), group[:, 1].max()) for group in groups])


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers at equal distances that enclose ``low .. high``."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    size = 10 ** math.floor(math.log10((high - low) / wanted))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k * wanted >= (high - low) * (1 - 1e-9))
    return [step * k for k in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


def tens(ticks: Sequence[float]) -> int:
    """The power of ten that is better said once, beside the title, than at every tick."""
    power = math.floor(math.log10(max(abs(ticks[0]), abs(ticks[-1]))))
    return 0 if -2 <= power <= 5 else power


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def draw_axes(x: Axis, y: Axis, x_name: str, y_factor: float) -> list[Html]:
    """Grid lines, ticks and their numbers."""
    parts = []
    for tick in y.ticks:
        at = f"{y(tick):.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", f"{tick / y_factor:.10g}", x=LEFT - 7, y=at, dy="0.35em", text_anchor="end"))
    inside = [tick for tick in nice_ticks(x.ticks[0], x.ticks[-1], 6) if x.ticks[0] <= tick <= x.ticks[-1]]
    below = [(number(round(tick, 6)), x(tick), HEIGHT - BOTTOM + 16) for tick in inside]
    below.append((x_name, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3))
    return parts + [tag("text", words, x=f"{at:.1f}", y=line, text_anchor="middle") for words, at, line in below]


def draw_line(points: Points, style: str, x: Axis, y: Axis, unit: str) -> Html:
    """The mean as a line, the range behind it, the untrained encoder's height dotted."""
    parts = []
    for piece in np.split(points, np.flatnonzero(np.isnan(points[:, 1]))):
        pixels = [(x(place), y(mean), y(low), y(high)) for place, mean, low, high in piece if not np.isnan(mean)]
        around = [(p[0], p[3]) for p in pixels] + [(p[0], p[2]) for p in reversed(pixels)]
        # The first point twice: a piece of one point then shows as a dot.
        parts += [
            tag("polygon", points=joined(around)),
            tag("polyline", points=joined([*pixels[:1], *pixels])),
        ]
        if len(points) <= DOTS:
            parts += [tag("circle", cx=f"{p[0]:.1f}", cy=f"{p[1]:.1f}", r=3) for p in pixels]
    if begins_untrained(points, unit):
        at = f"{y(points[0, 1]):.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="untrained"))
    return tag("g", *parts, class_=style)


def joined(pixels: Sequence[Sequence[float]]) -> str:
    """The first two numbers of every entry as SVG coordinates."""
    return " ".join(f"{across:.1f},{down:.1f}" for across, down, *_ in pixels)


def begins_untrained(points: Points, unit: str) -> bool:
    """Whether the line is an accuracy that was also measured before the first step."""
    return unit == "%" and points[0, 0] == 0 and bool(np.isfinite(points[0, 1]))


def legend(lines: dict[str, Points], unit: str) -> Html:
    """Names of the lines with their newest values; a single line is named by the title."""
    entries = []
    for i, (name, points) in enumerate(lines.items(), start=1):
        newest = points[~np.isnan(points[:, 1])][-1, 1]
        entries.append(tag("span", tag("b", name), f" {newest:.1f}\u202f{unit}", class_=f"s{i}"))
    if any(begins_untrained(points, unit) for points in lines.values()):
        entries.append(tag("span", "dotted: before the first step"))
    return tag("div", *entries, class_="legend") if len(lines) > 1 else Html("")


def hover(lines: dict[str, Points], x: Axis, unit: str, x_name: str) -> list[Html]:
    """Upright bands that say the values at their place."""
    said: dict[float, list[str]] = {}
    for name, points in lines.items():
        for place, value, *_ in points:
            said.setdefault(float(place), []).append(f"{name} {number(float(value))}{unit}")
    places = sorted(said)
    edges = [x(place) for place in places]
    bounds = [LEFT, *((a + b) / 2 for a, b in pairwise(edges)), WIDTH - RIGHT]
    return [
        tag(
            "g",
            tag("title", f"{x_name} {number(round(place, 2))}\n" + "\n".join(said[place])),
            tag("rect", x=f"{left:.1f}", width=f"{right - left:.1f}", y=TOP, height=HEIGHT - TOP - BOTTOM),
            tag("line", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=TOP, y2=HEIGHT - BOTTOM),
            class_="hit",
        )
        for place, at, left, right in zip(places, edges, bounds, bounds[1:], strict=False)
    ]


def said(values: NDArray[np.float64]) -> str:
    """Shares of one, one after another."""
    return " ".join(percent(value) for value in values)


def seeds(untrained: NDArray[np.float64], trained: NDArray[np.float64], low: float, high: float) -> Html:
    """Every seed as a dot on a common line from ``low`` to ``high``."""
    place = Axis([low, max(high, low + 1e-6)], 8, 212)
    dots = [
        tag("circle", tag("title", f"{kind} {percent(value)}"), cx=f"{place(value):.1f}", cy=11, r=5, class_=kind)
        for kind, values in (("untrained", untrained), ("pretrained", trained))
        for value in values
    ]
    return tag(
        "svg",
        tag("line", x1=8, x2=212, y1=11, y2=11, class_="grid"),
        *dots,
        viewBox="0 0 220 22",
        class_="seeds",
        role="img",
        aria_label=f"untrained {said(untrained)}, pretrained {said(trained)}",
    )

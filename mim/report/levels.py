"""The numbers of a data set: a histogram and what is said beside it."""

from typing import Any

from mim.report.markup import Html, count, number, percent, tag

_WIDTH, _HEIGHT, _BELOW = 480, 140, 20


def level_rows(levels: dict[str, Any]) -> list[tuple[str, str]]:
    """What the histogram cannot show; nothing without it."""
    if not levels:
        return []
    distinct, low, high = levels["distinct"], number(levels["low"]), number(levels["high"])
    different = (
        number(distinct[0]) if len(set(distinct)) == 1 else f"{number(min(distinct))} to {number(max(distinct))}"
    )
    rows = [
        ("numbers", f"{low} to {high}, {different} different ones in a channel, in {count(levels['images'], 'image')}")
    ]
    for key, words in (("outside", "beyond 0 and 1 once scaled"), ("missing", "nodata")):
        rows += [(words, percent(levels[key]))] if levels[key] else []
    return rows


def level_chart(levels: dict[str, Any]) -> Html:
    """Histogram of the first channels as inline SVG."""
    shares = levels.get("shares") or []
    if not shares:
        return Html("")
    shares = shares[:3] if len(shares) >= 3 else shares[:1]
    top = max(max(channel) for channel in shares) or 1.0
    names = ("red", "green", "blue") if len(shares) == 3 and levels["high"] == 255 else ("1", "2", "3")
    lines = [
        tag("polyline", points=_outline(channel, top), class_=f"c{place}")
        for place, channel in enumerate(shares, start=1)
    ]
    ends = [
        tag("text", number(levels[end]), x=at, y=_HEIGHT + 15, text_anchor=anchor)
        for end, at, anchor in (("low", 0, "start"), ("high", _WIDTH, "end"))
    ]
    floor = tag("line", x1=0, x2=_WIDTH, y1=_HEIGHT, y2=_HEIGHT, class_="grid")
    svg = tag(
        "svg",
        floor,
        *lines,
        *ends,
        viewBox=f"0 -4 {_WIDTH} {_HEIGHT + _BELOW + 4}",
        role="img",
        aria_label=f"Histogram of the numbers in the files, {count(len(shares), 'channel')}",
    )
    keys = [
        tag("span", f"channel {name}" if name.isdigit() else name, class_=f"c{i}") for i, name in enumerate(names, 1)
    ]
    legend = tag("div", *keys[: len(shares)], class_="legend")
    return tag("figure", tag("figcaption", "Numbers in the files"), legend, svg, class_="narrow")


def _outline(shares: list[float], top: float) -> str:
    step = _WIDTH / len(shares)
    heights = [_HEIGHT * (1 - share / top) for share in shares]
    corners = [(place * step + side, height) for place, height in enumerate(heights) for side in (0, step)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)

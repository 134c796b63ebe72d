"""HTML in which foreign text is escaped by construction, and numbers as people write them."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image


class Html(str):
    """Markup in which all foreign text is escaped already."""


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; children that are not ``Html`` are escaped, and so are all attributes (``class_``, ``for_``)."""
    inside = "".join(child if isinstance(child, Html) else escape(str(child)) for child in children)
    described = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{described}>{inside}</{name}>")


def section(title: str, *children: object, lead: str = "") -> Html:
    """A part of the page, empty if it would hold nothing but its title."""
    if not any(children):
        return Html("")
    return tag("section", tag("h2", title), tag("p", lead, class_="lead") if lead else Html(""), *children)


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> Html:
    """Rows of cells; the first cell of a row is its title."""
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    header = tag("tr", *(tag("th", cell, scope="col") for cell in head)) if head else Html("")
    return tag("div", tag("table", header, *body), class_="scroll") if body else Html("")


def folded(title: str, content: object) -> Html:
    """Something to unfold; empty without content."""
    inside = content if isinstance(content, Html) else tag("pre", content)
    return tag("details", tag("summary", title), inside) if content else Html("")


def picture(image: Image.Image, alt: str, budget: int) -> Html:
    """An inlined picture of at most ``budget`` bytes: it shrinks until it fits."""
    while True:
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", quality=84)
        if buffer.tell() <= budget:
            break
        scale = 0.9 * math.sqrt(budget / buffer.tell())
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Html(f'<img src="{source}" alt="{escape(alt)}" width="{image.width}" height="{image.height}">')


def zoomable(shown: Html) -> Html:
    """A picture that fills the window when one clicks on it, or presses space on it, and goes back at the next."""
    return tag("label", Html('<input type="checkbox" aria-label="enlarge the picture">'), shown, class_="zoom")


def number(value: object) -> str:
    """Four digits that matter, thousands apart; text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 10_000 and math.isfinite(value)):
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.4g}"


def percent(value: float) -> str:
    """A share of one as per cent."""
    return f"{100 * value:.1f}\u202f%"


def duration(seconds: float) -> str:
    """The two largest units of a time."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 1:
        return f"{int(days)} d {int(hours % 24)} h"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(minutes)} min {int(seconds % 60)} s" if minutes >= 1 else f"{seconds:.0f} s"


def count(amount: int, noun: str) -> str:
    """``1 image``, ``2 images``."""
    plural = {"class": "classes"}.get(noun, f"{noun}s")
    return f"{number(amount)} {noun if amount == 1 else plural}"

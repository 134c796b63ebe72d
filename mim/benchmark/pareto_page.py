"""The page that shows what token reductions cost and what they bring: a table and a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mim.reduction import TokenReduction
from mim.report.markup import picture, section, table, tag
from mim.report.style import PAGE, STYLE
from mim.report.tables import markdown_table, text_table
from mim.transfer.measurement import finish_section

_PICTURE_BYTES = 400_000
_INK = "#7a7a7a"


@dataclass
class Point:
    """A reduction at one rate.

    Args:
        name: of its recipe; ``none`` is the whole model.
        reduction: what runs.
        speed: as :func:`mim.benchmark.inference.measure` gives it.
        scores: shares of 1 by what was scored.
    """

    name: str
    reduction: TokenReduction | None
    speed: dict[str, Any]
    scores: dict[str, float]

    @property
    def setting(self) -> str:
        """Of its schedule, as the call that builds it."""
        return "" if self.reduction is None else repr(self.reduction.schedule)


def timing_in_words(points: Sequence[Point], batch_size: int, rounds: int) -> str:
    """On what the points were timed, and how."""
    device = torch.cuda.get_device_name() if points[0].speed["device"] == "cuda" else "CPU"
    where = f"{device}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    return (
        f"Speed: batches of {batch_size}, all models in turn, median of the ratios to the whole model in {rounds} "
        f"rounds, {where}, torch {torch.__version__}."
    )


def write(points: Sequence[Point], folder: Path, words: str, facts: dict[str, Any]) -> None:
    """Writes ``metrics.json``, ``pareto.md``, ``pareto.png`` and ``pareto.html``, and prints the table.

    Args:
        points: for everything that was scored, the whole model first.
        folder: of the results.
        words: how the numbers came about.
        facts: for ``metrics.json``.
    """
    scored = _scored(points)
    head = ["", "setting", "multiply-adds", "speed, wall", "speed, processor time", "images/s", *scored]
    rows = [
        [
            point.name,
            point.setting,
            f"{point.speed['share']:.0%}",
            f"{point.speed['speedup']:.2f}",
            f"{point.speed['speedup_processor']:.2f}",
            f"{point.speed['images_per_second']:.0f}",
            *(f"{100 * point.scores[what]:.1f} %" if what in point.scores else "" for what in scored),
        ]
        for point in points
    ]
    print(f"\n{words}\n\n{text_table(head, rows)}")
    title = "Token reductions: accuracy over speed"
    metrics = {f"{point.name} {point.setting}".strip() + _task(point, scored): _facts(point) for point in points}
    content = {"title": title, "protocol": words, "metrics": metrics} | facts
    (folder / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "pareto.md").write_text(markdown_table(head, rows), encoding="utf-8")
    save_chart(points, folder / "pareto.png")
    with Image.open(folder / "pareto.png") as image:
        shown = picture(image.convert("RGBA"), title, _PICTURE_BYTES)
    body = [
        tag("header", tag("h1", title), tag("p", words, class_="lead")),
        section("Up and to the right is better", tag("figure", shown)),
        section("Numbers", table(rows, head=head)),
    ]
    page = PAGE.format(title=escape(title), style=STYLE, body="\n".join(body))
    (folder / "pareto.html").write_text(page, encoding="utf-8")
    print(f"  page    {folder / 'pareto.html'}")
    finish_section(folder)


def save_chart(points: Sequence[Point], path: Path) -> None:
    """A panel for everything that was scored; each reduction is a line through its rates."""
    scored = _scored(points)
    figure = Figure(figsize=(6.5 * len(scored), 4.5), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(scored), squeeze=False)[0]
    names = list(dict.fromkeys(point.name for point in points if point.reduction is not None))
    for axes, what in zip(panels, scored, strict=True):
        seen = [point for point in points if what in point.scores]
        whole = seen[0]
        axes.axhline(100 * whole.scores[what], color=_INK, linestyle=":", linewidth=1)
        for number, name in enumerate(names):
            own = sorted((p.speed["speedup_processor"], 100 * p.scores[what]) for p in seen if p.name == name)
            if not own:
                continue
            style = {"color": f"C{number % 10}", "marker": "os^vDPX*"[number % 8], "linewidth": 1.5}
            axes.plot(*zip(*own, strict=True), label=name, **style)
        axes.plot([1.0], [100 * whole.scores[what]], "k*", markersize=12, label="whole model")
        _label(axes, what)
        axes.legend(fontsize=9, loc="best")
    figure.savefig(path)


def _label(axes: Axes, what: str) -> None:
    axes.set_xlabel("speed over the whole model (processor time)")
    axes.set_ylabel(f"{what}, per cent")
    axes.grid(color="#dddddd", linewidth=0.6)


def _task(point: Point, scored: Sequence[str]) -> str:
    """Tells apart points that were scored by one of several things."""
    return "" if len(point.scores) == len(scored) else f", {next(iter(point.scores))}"


def _scored(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(what for point in points for what in point.scores))


def _facts(point: Point) -> dict[str, Any]:
    names = ("share", "speedup", "speedup_processor", "images_per_second", "gmac")
    return {name: point.speed[name] for name in names} | point.scores

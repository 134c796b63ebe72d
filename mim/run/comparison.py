"""Several runs side by side: one table over their seeds, one page with the same images under each of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mim.atomic import replaced
from mim.data.pretrain import PretrainData
from mim.errors import UserError
from mim.pictures.strips import strip
from mim.report.charts import chart
from mim.report.markup import Html, picture, section, table, tag
from mim.report.record import KNN, LINEAR, RANKME, Points, Run, read_metrics, read_run
from mim.report.style import PAGE, STYLE
from mim.report.tables import markdown_table, spread, text_table
from mim.run.folder import named_run
from mim.run.weights import load_method

_PICTURE_BYTES = 400_000
UNTRAINED = "untrained"


@dataclass
class Entry:
    """Runs that differ in their seed alone.

    Args:
        name: of the row.
        runs: their folders.
        scores: by what was measured: one value per run, or those of the only run's seeds.
    """

    name: str
    runs: list[Path]
    scores: dict[str, list[float]] = field(default_factory=dict)


def collect(runs: Sequence[Path]) -> list[Entry]:
    """Reads what the runs have measured; the last entry holds their untrained encoders.

    Runs are one entry if their names differ only in what follows ``-seed-``.

    Raises:
        UserError: if a folder is no run.
    """
    groups: dict[str, list[Path]] = {}
    for run in runs:
        if not (run / "summary.json").is_file():
            raise UserError(f"--runs {run}: no run there", hint=named_run("--runs"))
        groups.setdefault(run.name.partition("-seed-")[0], []).append(run)
    entries, untrained = [], Entry(UNTRAINED, [])
    for name, folders in groups.items():
        entry = Entry(name, folders)
        for folder in folders:
            for what, (trained, random) in _measured(folder).items():
                # Of several runs each gives its mean, so that the spread is that of training, not of the probe.
                entry.scores.setdefault(what, []).extend(trained if len(folders) == 1 else [_mean(trained)])
                untrained.scores.setdefault(what, []).extend(random)
        entries.append(entry)
    return [*entries, untrained] if any(untrained.scores.values()) else entries


def tables(entries: Sequence[Entry]) -> tuple[str, str, list[list[str]]]:
    """The table for a terminal, as Markdown, and its rows, the first one being the head."""
    columns = list(dict.fromkeys(what for entry in entries for what in entry.scores))
    head = ["", "runs", *columns]
    rows = [
        [entry.name, str(len(entry.runs) or ""), *(spread(entry.scores.get(column, [])) for column in columns)]
        for entry in entries
    ]
    return text_table(head, rows), markdown_table(head, rows), [head, *rows]


def strips(entries: Sequence[Entry], images: int) -> dict[str, Image.Image]:
    """The same images under the first run of every entry: input, hidden, reconstruction, attention, features."""
    shown: dict[str, Image.Image] = {}
    path: str | None = None
    for entry in entries:
        for run in entry.runs[:1]:
            method, data, config = load_method(run)
            encoder, path = method.evaluated, path or data.path
            # The images of the first run, with the channels, size and normalisation that this one wants.
            mean, std = data.statistics(encoder.in_chans)
            opened = PretrainData(path, num_workers=0, mean=mean, std=std)
            opened.pixels, opened.windows, opened.resolved = data.pixels, data.windows, True
            opened.open(encoder.img_size, encoder.in_chans, config.seed)
            source = opened.evaluation or opened.source
            chosen = [place * len(source) // images for place in range(min(images, len(source)))]
            batches = [pixels for pixels, _ in opened.center_batches(source, chosen)]
            if not batches:
                raise UserError(
                    f"--runs {run}: no image of {path} can be read with the {encoder.in_chans} channels that it wants",
                    hint="runs on images of one kind",
                )
            batch = torch.cat(batches)
            with torch.no_grad():
                views, measured = method.visualize(batch), not data.pixels.pictures
                shown[entry.name] = strip(batch, views, encoder, opened.mean, opened.std, measured)
    return shown


LINES = 6
"""Curves in one chart; more could not be told apart."""


def curves(entries: Sequence[Entry]) -> list[Html]:
    """How the first run of every entry got there: over the images that it saw, and the time that its steps took."""
    records = {entry.name: read_run(entry.runs[0]) for entry in entries if entry.runs}
    charts = []
    for title, key, unit in (("k-NN", KNN, "%"), ("Linear", LINEAR, "%"), ("RankMe", RANKME, "")):
        for across, places in (("images seen", images_seen), ("minutes of training", minutes)):
            lines = {
                name: np.stack([places(record, record.metrics[key][:, 0]), record.metrics[key][:, 1]], axis=1)
                for name, record in list(records.items())[:LINES]
                if key in record.metrics
            }
            lines = {name: points for name, points in lines.items() if np.isfinite(points[:, 0]).all()}
            charts.append(chart(f"{title} over {across}", lines, None, unit, across=across))
    return [drawn for drawn in charts if drawn]


def images_seen(record: Run, steps: Points) -> Points:
    """Images that a run has seen after each of ``steps (M,)``."""
    return steps * float(record.summary.get("batch_size") or 1)


def minutes(record: Run, steps: Points) -> Points:
    """Minutes that a run has trained for after each of ``steps (M,)``, evaluations left out."""
    speed = read_metrics(record.folder / "timing.csv").get("images_per_second", np.zeros((0, 2)))
    if not len(speed):
        return np.full(len(steps), np.nan)
    taken = np.diff(speed[:, 0], prepend=0) * float(record.summary.get("batch_size") or 1) / speed[:, 1]
    found: Points = np.interp(steps, [0, *speed[:, 0]], [0, *np.cumsum(taken) / 60])
    return found


def write_page(
    path: Path, rows: Sequence[Sequence[str]], shown: dict[str, Image.Image], drawn: Sequence[Html] = ()
) -> None:
    """Writes one page that needs nothing but a browser."""
    figures = [
        tag("figure", tag("figcaption", name), picture(image, f"{name}: the same images", _PICTURE_BYTES))
        for name, image in shown.items()
    ]
    lead = (
        "Mean ± standard deviation, over seeds of training where there are several runs, else over those of the probe."
    )
    body = [
        tag("header", tag("h1", "Comparison of runs"), tag("p", lead, class_="lead")),
        section("What they are worth", table(rows[1:], head=list(rows[0]))),
        section("How they got there", tag("div", *drawn, class_="charts") if drawn else "", lead=CURVES),
        section("The same images under each", tag("div", *figures, class_="pair") if figures else Html("")),
    ]
    page = PAGE.format(title=escape("Comparison of runs"), style=STYLE, body="\n".join(filter(None, body)))
    with replaced(path) as aside:
        aside.write_text(page, encoding="utf-8")


CURVES = "One split of the probes, the first run of each row. Time is that of the steps, on the machine of each run."


def _measured(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Scores of a run and of its untrained encoders, by what was measured."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    record = read_run(run)
    probe, pool = record.summary.get("probe") or {}, f", {record.pool}" if record.pool else ""
    for kind, name in (("knn", "k-NN"), ("linear", "linear")):
        if kind in probe:
            found[f"{name} (run{pool})"] = probe[kind]["trained"], probe[kind]["untrained"]
    for file in sorted(run.glob("evaluation/*/metrics.json")):
        content = json.loads(file.read_text())
        metrics: dict[str, Any] = content.get("metrics", {})
        pool = f" ({content['pool']})" if content.get("pool") else ""  # older evaluations do not say
        for name, values in metrics.items():
            if isinstance(values, list) and name in ("top-1", "20-NN top-1", "mIoU"):
                found[f"{file.parent.name} {name}{pool}"] = values, metrics.get(f"{name}, {UNTRAINED}") or []
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

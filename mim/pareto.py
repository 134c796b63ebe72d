"""What token reductions cost and what they bring: accuracy over measured speed, every reduction at several rates."""

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

from mim.benchmark_reduction import Inference, measure
from mim.evaluation.features import Features
from mim.evaluation.knn import knn_accuracy
from mim.measure import TRAINED, Measurement, finish_section
from mim.reduction import TokenReducedViT, TokenReduction
from mim.reduction.macs import count_macs
from mim.reduction.recipes import recipe
from mim.report.markup import picture, section, table, tag
from mim.report.style import PAGE, STYLE
from mim.report.tables import markdown_table, text_table
from mim.run import evaluation_folder
from mim.segment_options import HeadRecipe, MaskedSubject, Scoring
from mim.segmenting import Segmentation
from mim.subject import Subject

KNN, MIOU = "20-NN top-1", "mIoU"
_PICTURE_BYTES = 400_000
_INK = "#7a7a7a"


@dataclass
class Point:
    """A reduction at one rate.

    Args:
        name: of its recipe; ``none`` is the whole model.
        reduction: what runs.
        speed: as :func:`mim.benchmark_reduction.measure` gives it.
        scores: shares of 1 by what was scored.
    """

    name: str
    reduction: TokenReduction | None
    speed: dict[str, Any]
    scores: dict[str, float]


def sweep(
    subject: Subject, masks: str | None, names: Sequence[str], shares: Sequence[float], batch_size: int, rounds: int
) -> list[Point]:
    """Speed, 20-NN accuracy and, if there are masks, mIoU of a k-NN head; the whole model comes first.

    Args:
        subject: weights and labelled images.
        masks: images with masks, as ``segment`` takes them.
        names: recipes that need no training.
        shares: of the model's multiply-adds that each is set to.
        batch_size: of the timed forward passes, on noise.
        rounds: of turns.
    """
    measurement = Measurement.open(subject)
    vit = measurement.loaded.encoder.vit
    reductions: list[tuple[str, TokenReduction | None]] = [("none", None)]
    reductions += [(name, recipe(name).fit(vit, share).eval()) for name in names for share in shares]
    points = [Point(name, reduction, {}, {}) for name, reduction in reductions]
    for point, row in zip(points, _speeds(measurement, points, batch_size, rounds), strict=True):
        point.speed = row | {"device": measurement.device.type}
    segmentation = _segmentation(subject, masks) if masks else None
    for point in points:
        point.scores[KNN] = _knn(measurement, point.reduction)
        if segmentation is not None:
            segmentation.reduction = point.reduction
            point.scores[MIOU] = segmentation.score(TRAINED, 0, Path())[0].miou
        print(f"  {point.name:<12}{_setting(point):<40}{_numbers(point)}", flush=True)
    return points


def _speeds(measurement: Measurement, points: Sequence[Point], batch_size: int, rounds: int) -> list[dict[str, Any]]:
    encoder = measurement.loaded.encoder
    shape = batch_size, encoder.in_chans, *encoder.img_size
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(measurement.device)
    models = []
    for point in points:
        model = encoder.vit if point.reduction is None else TokenReducedViT(encoder.vit, point.reduction)
        macs = count_macs(encoder.vit, point.reduction).total
        models.append(Inference(point.name, _setting(point), model.eval(), images, macs))
    return measure(models, rounds)


def _knn(measurement: Measurement, reduction: TokenReduction | None) -> float:
    """On features of the patches' mean, which every encoder has, from reduced images on both sides."""
    encoder = measurement.loaded.encoder
    encoder.reduction = reduction
    (bank,), queries = measurement.banks(encoder, Features(pool="mean"))
    encoder.reduction = None
    return knn_accuracy(*bank, *queries, k=20)


def _segmentation(subject: Subject, masks: str) -> Segmentation:
    """The evaluation that scores without training: labelled patches vote."""
    asked = MaskedSubject(subject.weights, masks, subject.model, subject.img_size, trust=subject.trust)
    scoring = Scoring(accelerator="cpu" if subject.device == "cpu" else "auto", devices=1)
    return Segmentation(asked, HeadRecipe(head="knn", bank=10000), scoring)


def protocol(points: Sequence[Point], subject: Subject, masks: str | None, batch_size: int, rounds: int) -> str:
    """How the numbers came about, in words."""
    device = torch.cuda.get_device_name() if points[0].speed["device"] == "cuda" else "CPU"
    where = f"{device}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    dense = f"; mIoU: k-NN head on {masks}, reduced patches put back" if masks else ""
    return (
        f"Weights as they are, reduced where features are learnt from and where they are scored. 20-NN: mean of patch "
        f"tokens, {subject.data}{dense}. Speed: batches of {batch_size}, all models in turn, median of the ratios to "
        f"the whole model in {rounds} rounds, {where}, torch {torch.__version__}."
    )


def write(points: Sequence[Point], subject: Subject, masks: str | None, batch_size: int, rounds: int) -> Path:
    """Writes ``metrics.json``, ``pareto.md``, ``pareto.png`` and ``pareto.html``, and prints the table."""
    folder, words = (
        evaluation_folder(subject.weights, subject.out, "pareto"),
        protocol(points, subject, masks, batch_size, rounds),
    )
    scored = list(points[0].scores)
    head = ["", "setting", "multiply-adds", "speed, wall", "speed, processor time", "images/s", *scored]
    rows = [
        [
            point.name,
            _setting(point),
            f"{point.speed['share']:.0%}",
            f"{point.speed['speedup']:.2f}",
            f"{point.speed['speedup_processor']:.2f}",
            f"{point.speed['images_per_second']:.0f}",
            *(f"{100 * point.scores[what]:.1f} %" for what in scored),
        ]
        for point in points
    ]
    print(f"\n{words}\n\n{text_table(head, rows)}")
    title = "Token reductions: accuracy over speed"
    metrics = {f"{point.name} {_setting(point)}".strip(): _facts(point) for point in points}
    content: dict[str, Any] = {"title": title, "protocol": words, "metrics": metrics}
    content |= {"weights": subject.weights, "data": subject.data, "masks": masks}
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
    return folder


def save_chart(points: Sequence[Point], path: Path) -> None:
    """A panel for everything that was scored; each reduction is a line through its rates."""
    whole, scored = points[0], list(points[0].scores)
    figure = Figure(figsize=(6.5 * len(scored), 4.5), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(scored), squeeze=False)[0]
    names = list(dict.fromkeys(point.name for point in points[1:]))
    for axes, what in zip(panels, scored, strict=True):
        axes.axhline(100 * whole.scores[what], color=_INK, linestyle=":", linewidth=1)
        for number, name in enumerate(names):
            own = sorted((p.speed["speedup_processor"], 100 * p.scores[what]) for p in points if p.name == name)
            style = {"color": f"C{number % 10}", "marker": "os^vDPX*"[number % 8], "linewidth": 1.5}
            axes.plot(*zip(*own, strict=True), label=name, **style)
        axes.plot([1.0], [100 * whole.scores[what]], "k*", markersize=12, label="whole model")
        _label(axes, what)
    panels[-1].legend(fontsize=9, loc="best")
    figure.savefig(path)


def _label(axes: Axes, what: str) -> None:
    axes.set_xlabel("speed over the whole model (processor time)")
    axes.set_ylabel(f"{what}, per cent")
    axes.grid(color="#dddddd", linewidth=0.6)


def _setting(point: Point) -> str:
    return "" if point.reduction is None else repr(point.reduction.schedule)


def _facts(point: Point) -> dict[str, Any]:
    names = ("share", "speedup", "speedup_processor", "images_per_second", "gmac")
    return {name: point.speed[name] for name in names} | point.scores


def _numbers(point: Point) -> str:
    shown = "".join(f"   {what} {value:.1%}" for what, value in point.scores.items())
    return f"speed {point.speed['speedup']:.2f}, processor time {point.speed['speedup_processor']:.2f}{shown}"

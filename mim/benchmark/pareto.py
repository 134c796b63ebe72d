"""What token reductions cost and what they bring: accuracy over measured speed, every reduction at several rates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mim.benchmark.inference import Inference, measure
from mim.benchmark.pareto_page import Point, timing_in_words
from mim.evaluation.features import Features
from mim.evaluation.knn import knn_accuracy
from mim.options.classification import Subject
from mim.options.segmentation import HeadRecipe, MaskedSubject, Scoring
from mim.reduction import TokenReducedViT, TokenReduction
from mim.reduction.macs import count_macs
from mim.reduction.recipes import recipe
from mim.transfer.measurement import TRAINED, Measurement
from mim.transfer.segmentation import Segmentation

KNN, MIOU = "20-NN top-1", "mIoU"


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
        print(f"  {point.name:<12}{point.setting:<40}{_numbers(point)}", flush=True)
    return points


def _speeds(measurement: Measurement, points: Sequence[Point], batch_size: int, rounds: int) -> list[dict[str, Any]]:
    encoder = measurement.loaded.encoder
    shape = batch_size, encoder.in_chans, *encoder.img_size
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(measurement.device)
    models = []
    for point in points:
        model = encoder.vit if point.reduction is None else TokenReducedViT(encoder.vit, point.reduction)
        macs = count_macs(encoder.vit, point.reduction).total
        models.append(Inference(point.name, point.setting, model.eval(), images, macs))
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
    """How the numbers of :func:`sweep` came about, in words."""
    dense = f"; mIoU: k-NN head on {masks}, reduced patches put back" if masks else ""
    return (
        f"Weights as they are, reduced where features are learnt from and where they are scored. 20-NN: mean of patch "
        f"tokens, {subject.data}{dense}. {timing_in_words(points, batch_size, rounds)}"
    )


def _numbers(point: Point) -> str:
    shown = "".join(f"   {what} {value:.1%}" for what, value in point.scores.items())
    return f"speed {point.speed['speedup']:.2f}, processor time {point.speed['speedup_processor']:.2f}{shown}"

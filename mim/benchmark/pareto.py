"""What token reductions cost and what they bring: accuracy over measured speed, every reduction at several rates."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from mim.benchmark.inference import Inference, measure
from mim.benchmark.pareto_page import Point, timing_in_words
from mim.evaluation.features import Features
from mim.evaluation.knn import knn_accuracy
from mim.options.classification import ClassificationOptions
from mim.options.evaluation import EvaluationOptions, TrainingOptions
from mim.options.segmentation import Scoring, SegmentationOptions, SegmentationRecipe
from mim.reduction import TokenReducedViT, TokenReduction
from mim.reduction.macs import count_macs
from mim.reduction.recipes import recipe
from mim.transfer.classification import Classification
from mim.transfer.measurement import PRETRAINED
from mim.transfer.segmentation import Segmentation

KNN, MIOU = "20-NN top-1", "mIoU"


def sweep(
    measurement: Classification,
    features: Features,
    masks: str | None,
    names: Sequence[str],
    shares: Sequence[float],
    batch_size: int,
    rounds: int,
) -> list[Point]:
    """Speed, 20-NN accuracy and, if there are masks, mIoU of a k-NN head; the whole model comes first.

    Args:
        measurement: weights and labelled images.
        features: what stands for an image.
        masks: images with masks, as ``segment`` takes them.
        names: recipes that need no training.
        shares: of the model's multiply-adds that each is set to.
        batch_size: of the timed forward passes, on noise.
        rounds: of turns.
    """
    vit = measurement.loaded.encoder.vit
    reductions: list[tuple[str, TokenReduction | None]] = [("none", None)]
    reductions += [(name, recipe(name).fit(vit, share).eval()) for name in names for share in shares]
    points = [Point(name, reduction, {}, {}) for name, reduction in reductions]
    for point, row in zip(points, _speeds(measurement, points, batch_size, rounds), strict=True):
        point.speed = row | {"device": measurement.device.type}
    segmentation = _segmentation(measurement.options, masks) if masks else None
    for point in points:
        point.scores[KNN] = _knn(measurement, features, point.reduction)
        if segmentation is not None:
            segmentation.reduction = point.reduction
            point.scores[MIOU] = segmentation.score(PRETRAINED, 0, Path())[0].miou
        print(f"  {point.name:<12}{point.setting:<40}{_numbers(point)}", flush=True)
    return points


def _speeds(measurement: Classification, points: Sequence[Point], batch_size: int, rounds: int) -> list[dict[str, Any]]:
    encoder = measurement.loaded.encoder
    shape = batch_size, encoder.in_chans, *encoder.img_size
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(measurement.device)
    models = []
    for point in points:
        model = encoder.vit if point.reduction is None else TokenReducedViT(encoder.vit, point.reduction)
        macs = count_macs(encoder.vit, point.reduction).total
        models.append(Inference(point.name, point.setting, model.eval(), images, macs))
    return measure(models, rounds)


def _knn(measurement: Classification, features: Features, reduction: TokenReduction | None) -> float:
    """From reduced images on both sides."""
    encoder = measurement.loaded.encoder
    encoder.reduction = reduction
    (bank,), queries = measurement.banks(encoder, features)
    encoder.reduction = None
    return knn_accuracy(*bank, *queries, k=20)


def _segmentation(options: ClassificationOptions, masks: str) -> Segmentation:
    """The evaluation that scores without training: labelled patches vote."""
    shared = {field.name: getattr(options, field.name) for field in fields(EvaluationOptions)}
    asked = SegmentationOptions(**shared | {"data": masks}, crop=options.img_size)
    return Segmentation(asked, SegmentationRecipe(head="knn", bank=10000), Scoring(), TrainingOptions())


def protocol(
    points: Sequence[Point],
    options: ClassificationOptions,
    features: Features,
    masks: str | None,
    batch_size: int,
    rounds: int,
) -> str:
    """How the numbers of :func:`sweep` came about, in words."""
    dense = f"; mIoU: k-NN head on {masks}, reduced patches put back" if masks else ""
    return (
        f"Weights as they are, reduced where features are learnt from and where they are scored. 20-NN: "
        f"{features.describe()}, {options.data}{dense}. {timing_in_words(points, batch_size, rounds)}"
    )


def _numbers(point: Point) -> str:
    shown = "".join(f"   {what} {value:.1%}" for what, value in point.scores.items())
    return f"speed {point.speed['speedup']:.2f}, processor time {point.speed['speedup_processor']:.2f}{shown}"

"""Classify images by their nearest neighbours: ``python tools/knn.py --weights runs/001-mae-photos``."""

from typing import Literal

from mim.options.classification import Subject
from mim.options.ranges import Count, Positive, Whole


def run(
    subject: Subject,
    k: tuple[Count, ...] = (10, 20, 100, 200),
    temperature: Positive = 0.07,
    layers: Count = 1,
    pool: Literal["cls", "mean", "both"] = "cls",
    seeds: Whole = 3,
) -> None:
    """k-NN accuracy of frozen features, beside untrained encoders.

    Args:
        subject: weights and images.
        k: numbers of neighbours that vote, as [10,20].
        temperature: of the votes.
        layers: last blocks whose features are put end to end.
        pool: class token, mean of the patch tokens, or both.
        seeds: untrained encoders to compare with.
    """
    # torch is imported when there is something to measure: --help must not wait for it.
    from mim.evaluation.bank import Bank
    from mim.evaluation.features import Features
    from mim.evaluation.knn import knn_accuracies
    from mim.transfer.measurement import TRAINED, UNTRAINED, Measurement, Scores, finish_section, share_out

    measurement, features = Measurement.open(subject), Features(layers, pool)
    encoders = [(TRAINED, measurement.loaded.encoder)]
    encoders += [(UNTRAINED, measurement.untrained(seed)) for seed in range(seeds)]
    banks = [measurement.banks(encoder, features) for _, encoder in encoders]

    def vote(features: tuple[list[Bank], Bank]) -> dict[int, dict[int, float]]:
        (bank,), queries = features
        asked, truth = (tensor.to(measurement.device) for tensor in queries)
        return knn_accuracies(*bank, asked, truth, k, temperature)

    scores: Scores = {}
    for (who, _), answer in zip(encoders, share_out(banks, vote), strict=True):
        for neighbours, tops in answer.items():
            for top, value in tops.items():
                scores.setdefault(f"{neighbours}-NN top-{top}", {}).setdefault(who, []).append(value)
    if measurement.first:
        votes = f"votes exp(cosine / {temperature:g})"
        protocol = f"frozen encoder, {features.describe()}, {measurement.protocol()}; {votes}."
        folder = measurement.folder("knn")
        measurement.write(folder, "k-NN classification", protocol, scores)
        finish_section(folder)

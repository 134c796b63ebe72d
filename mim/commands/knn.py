"""Classify images by their nearest neighbours: ``python tools/knn.py --weights runs/001-mae-photos``."""

from typing import Literal

from mim.options.classification import ClassificationOptions
from mim.options.evaluation import Scores
from mim.options.ranges import Count, Positive, Whole


def run(
    options: ClassificationOptions,
    k: tuple[Count, ...] = (10, 20, 100, 200),
    temperature: Positive = 0.07,
    layers: Count = 1,
    pool: Literal["cls", "mean", "both"] | None = None,
    seeds: Whole = 3,
) -> Scores:
    """k-NN accuracy of frozen features, beside untrained encoders.

    Args:
        options: weights and images.
        k: numbers of neighbours that vote, as [10,20].
        temperature: of the votes.
        layers: last blocks whose features are put end to end.
        pool: class token, mean of the patch tokens, or both; what the run or the model pools by unless given.
        seeds: untrained encoders to compare with.
    """
    # torch is imported when there is something to measure: --help must not wait for it.
    from mim.evaluation.balance import balanced_accuracy, right_per_class
    from mim.evaluation.bank import Bank
    from mim.evaluation.features import Features
    from mim.evaluation.knn import accuracies, knn_answers
    from mim.transfer.classification import Classification
    from mim.transfer.measurement import PRETRAINED, UNTRAINED, finish_section, share_out

    measurement = Classification(options)
    features = Features(layers, pool or measurement.loaded.pool)
    encoders = [(PRETRAINED, measurement.loaded.encoder)]
    encoders += [(UNTRAINED, measurement.untrained(seed)) for seed in range(seeds)]
    banks = [measurement.banks(encoder, features) for _, encoder in encoders]

    def vote(features: tuple[list[Bank], Bank]) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
        (bank,), queries = features
        asked, truth = (tensor.to(measurement.device) for tensor in queries)
        shares: dict[str, float] = {}
        right: dict[str, dict[str, int]] = {}
        for neighbours, ranked in knn_answers(*bank, asked, k, temperature).items():
            named = {f"top-{top}": share for top, share in accuracies(ranked, truth).items()}
            if measurement.uneven:
                named["balanced accuracy"] = balanced_accuracy(ranked[:, 0], truth)
                right[f"{neighbours}-NN"] = right_per_class(ranked[:, 0], truth, measurement.classes)
            shares |= {f"{neighbours}-NN {name}": share for name, share in named.items()}
        return shares, right

    scores: Scores = {}
    answers = share_out(banks, vote)
    for (who, _), (answer, _) in zip(encoders, answers, strict=True):
        for name, value in answer.items():
            scores.setdefault(name, {}).setdefault(who, []).append(value)
    if measurement.is_main_process:
        votes = f"votes exp(cosine / {temperature:g})"
        protocol = f"frozen encoder, {features.describe()}, {measurement.protocol()}; {votes}."
        folder = measurement.folder("knn")
        details = measurement.class_sizes(answers[0][1])
        measurement.write(folder, "k-NN classification", protocol, scores, features.pool, details)
        finish_section(folder)
    return scores

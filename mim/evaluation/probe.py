"""The two probes together, once or over several seeds."""

from collections.abc import Iterable

from torch import Tensor

from mim.evaluation.balance import balanced_accuracy
from mim.evaluation.knn import accuracies, knn_answers
from mim.evaluation.logistic import linear_answers
from mim.evaluation.splits import stratified_split


def probe(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, seed: int = 0) -> dict[str, float]:
    """Shares from 0 to 1: ``knn_top1``, ``linear_top1``, and ``knn_balanced``, ``linear_balanced`` over classes.

    Args:
        bank: see :func:`mim.evaluation.logistic.linear_accuracy`, as all others.
        bank_labels: of the bank.
        queries: to be classified.
        labels: of the queries.
        seed: names the held-out part.
    """
    answers = {
        "knn": knn_answers(bank, bank_labels, queries, (20,), top=1)[20],
        "linear": linear_answers(bank, bank_labels, queries, seed=seed)[:, None],
    }
    top1 = {f"{kind}_top1": accuracies(own, labels, (1,))[1] for kind, own in answers.items()}
    balanced = {
        f"{kind}_balanced": balanced_accuracy(own[:, 0], labels.to(own.device)) for kind, own in answers.items()
    }
    return top1 | balanced


def probe_seeds(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor | None = None,
    labels: Tensor | None = None,
    seeds: Iterable[int] = range(3),
) -> dict[str, list[float]]:
    """:func:`probe` once per seed, to tell a difference between encoders from luck of the draw.

    With a test set each seed leaves out another tenth of the bank. Without one, each seed holds out another fifth of
    every class as its test set.

    Args:
        bank: ``(M, D)`` features with labels.
        bank_labels: ``(M,)`` labels from 0.
        queries: ``(Q, D)`` features of a test set.
        labels: ``(Q,)`` its labels, given if ``queries`` is.
        seeds: one run each; the same seeds draw the same rows for every encoder, so runs can be compared in pairs.

    Returns:
        The keys of :func:`probe`, each with one value per seed.
    """
    runs = []
    for seed in seeds:
        if queries is None or labels is None:
            kept, held = stratified_split(bank_labels, 0.2, seed, "probe test set")
            test, truth = bank[held], bank_labels[held]
        else:
            kept, _ = stratified_split(bank_labels, 0.1, seed, "probe subsample")
            test, truth = queries, labels
        runs.append(probe(bank[kept], bank_labels[kept], test, truth, seed=seed))
    return {name: [run[name] for run in runs] for name in runs[0]}

"""Weighted k-nearest-neighbour classification of frozen features, as in DINO (arXiv:2104.14294) and iBOT."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest similarity matrix in memory: 256 x 65,536 floats are 64 MiB; larger ones leave a CPU's caches sooner.
_QUERY_ROWS = 256
_BANK_ROWS = 65536
_GROUP = 16
"""Columns that a CPU looks at through their largest number, before it sorts those of the best groups."""


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    top: int = 1,
) -> float:
    """Share of queries whose label gets one of the ``top`` largest votes of its neighbours in the bank.

    Each of the ``k`` most similar bank rows votes ``exp(cosine / temperature)`` for its label. Computed where the
    queries lie, in pieces; a bank elsewhere travels there piece by piece, so ImageNet's fits.

    Args:
        bank: ``(M, D)`` features with known labels.
        bank_labels: ``(M,)`` labels from 0.
        queries: ``(Q, D)`` features to classify.
        labels: ``(Q,)`` their true labels.
        k: number of neighbours, all of the bank if it is smaller; the papers use 20.
        temperature: of the votes; the papers use 0.07.
        top: 1 for top-1, 5 for top-5. A class without a vote is no answer.

    Returns:
        Accuracy from 0 to 1.
    """
    return knn_accuracies(bank, bank_labels, queries, labels, (k,), temperature, (top,))[k][top]


def knn_accuracies(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    tops: Sequence[int] = (1, 5),
) -> dict[int, dict[int, float]]:
    """:func:`knn_accuracy` for several numbers of neighbours, which are searched once.

    Returns:
        Accuracies from 0 to 1 by ``k``, then by ``top``.
    """
    answers = knn_answers(bank, bank_labels, queries, k, temperature, max(tops))
    return {neighbours: accuracies(ranked, labels, tops) for neighbours, ranked in answers.items()}


def knn_answers(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: Sequence[int], temperature: float = 0.07, top: int = 5
) -> dict[int, Tensor]:
    """Classes by their votes, for several numbers of neighbours, which are searched once.

    Returns:
        By ``k``, ``(Q, top)`` classes with the most votes first, fewer if there are fewer classes; -1 without a vote.
    """
    if not len(bank) or not len(queries):
        raise ValueError(f"k-NN needs images on both sides, got {len(bank)} in the bank and {len(queries)} queries")
    classes = int(bank_labels.max()) + 1
    ranked: dict[int, list[Tensor]] = {neighbours: [] for neighbours in k}
    similarity, labels = nearest(bank, bank_labels, queries, max(k))  # nearest first
    weights = (similarity / temperature).exp()
    for own, answers in zip(torch.split(weights, _QUERY_ROWS), torch.split(labels, _QUERY_ROWS), strict=True):
        for neighbours in k:
            votes = own.new_zeros(len(own), classes)
            votes.scatter_add_(1, answers[:, :neighbours], own[:, :neighbours])
            strength, order = votes.topk(min(top, classes))  # (q, top)
            ranked[neighbours].append(order.where(strength > 0, -1))
    return {neighbours: torch.cat(parts) for neighbours, parts in ranked.items()}


def accuracies(ranked: Tensor, labels: Tensor, tops: Sequence[int] = (1, 5)) -> dict[int, float]:
    """Share of the ``labels`` ``(Q,)`` that are among the first ``top`` of ``ranked`` ``(Q, >= top)``."""
    hit = ranked == labels.to(ranked.device)[:, None]
    return {top: int(hit[:, :top].sum()) / len(labels) for top in tops}


def nearest(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine ``(Q, k)`` and label ``(Q, k)`` of each query's nearest bank rows; the bank is gone through once."""
    queries = F.normalize(queries.float(), dim=1)
    similarity = queries.new_empty(len(queries), 0)
    labels = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for part, part_labels in zip(torch.split(bank, _BANK_ROWS), torch.split(bank_labels, _BANK_ROWS), strict=True):
        directions = F.normalize(part.to(queries.device).float(), dim=1)
        found = [largest(asked @ directions.T, min(k, len(part))) for asked in torch.split(queries, _QUERY_ROWS)]
        near, rows = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        # The best so far and the best of this part, of which the k best go on.
        similarity, kept = torch.cat([similarity, near], dim=1).topk(min(k, similarity.shape[1] + near.shape[1]))
        labels = torch.cat([labels, part_labels.to(queries.device)[rows]], dim=1).gather(1, kept)
    return similarity, labels


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row and their columns, as ``topk``; on a CPU faster, where rows are long.

    The k largest numbers lie in the k groups of columns with the largest maxima. Which of several equal numbers are
    taken at the end of the ranking is open, as it is in torch.

    Args:
        values: ``(q, M)``.
        k: at most ``M``.
    """
    width = values.shape[1] // _GROUP
    if values.device.type != "cpu" or width < 4 * k:
        return values.topk(k)
    maxima = values[:, : width * _GROUP].reshape(-1, _GROUP, width).amax(dim=1)  # (q, width)
    places = maxima.topk(k).indices[:, :, None] + torch.arange(_GROUP) * width
    rest = torch.arange(width * _GROUP, values.shape[1]).expand(len(values), -1)
    places = torch.cat([places.flatten(1), rest], dim=1)
    best, chosen = values.gather(1, places).topk(k)
    return best, places.gather(1, chosen)

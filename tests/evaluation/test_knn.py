import math

import pytest
import torch

from mim.evaluation import knn, knn_accuracy


def features(rows, classes=7, dim=6):
    labels = torch.randint(classes, (rows,))
    return torch.randn(rows, dim) + torch.eye(classes, dim)[labels], labels


def voted(bank, bank_labels, query, k, temperature):
    """Labels by falling vote, one query at a time, in plain Python."""
    cosines = [float(row @ query / (row.norm() * query.norm())) for row in bank]
    nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]
    votes = {}
    for i in nearest:
        label = int(bank_labels[i])
        votes[label] = votes.get(label, 0) + math.exp(cosines[i] / temperature)
    return sorted(votes, key=lambda label: -votes[label])


@pytest.mark.parametrize("top", [1, 3])
def test_votes_equal_a_loop_over_queries(top):
    bank, bank_labels = features(150)
    queries, labels = features(40)
    answers = [voted(bank.double(), bank_labels, query, 9, 0.07)[:top] for query in queries.double()]
    expected = sum(int(label) in answer for label, answer in zip(labels, answers, strict=True)) / 40
    assert 0.1 < expected < 0.95  # the comparison can fail both ways
    assert knn_accuracy(bank, bank_labels, queries, labels, k=9, top=top) == expected


def test_queries_in_pieces_give_the_same_votes(monkeypatch):
    bank, bank_labels = features(150)
    queries, labels = features(40)
    whole = knn_accuracy(bank, bank_labels, queries, labels)
    monkeypatch.setattr(knn, "_BANK_ROWS", 11)  # smaller than k and not a divisor
    monkeypatch.setattr(knn, "_QUERY_ROWS", 7)
    assert knn_accuracy(bank, bank_labels, queries, labels) == whole


def test_near_neighbours_outvote_many_far_ones():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    query, near, far = torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor([1])
    bank_labels = torch.tensor([0, 1, 1, 1])
    assert knn_accuracy(bank, bank_labels, query, near, k=4, temperature=0.07) == 1
    assert knn_accuracy(bank, bank_labels, query, far, k=4, temperature=10.0) == 1


def test_length_of_features_does_not_count():
    bank, bank_labels = features(60)
    queries, labels = features(20)
    scaled = bank * torch.rand(60, 1).add(0.1)
    assert knn_accuracy(scaled, bank_labels, queries, labels) == knn_accuracy(bank, bank_labels, queries, labels)


def test_a_class_without_a_vote_is_no_answer():
    bank, bank_labels = torch.eye(6), torch.arange(6)
    query = bank[:1].expand(6, 6)  # its one neighbour votes for 0
    assert knn_accuracy(bank, bank_labels, query, torch.arange(6), k=1, top=5) == 1 / 6


def test_a_bank_smaller_than_k_votes_as_a_whole():
    assert knn_accuracy(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), k=20) == 1


def test_an_empty_bank_is_refused():
    with pytest.raises(ValueError, match="0 in the bank"):
        knn_accuracy(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), torch.eye(3), torch.arange(3))


@pytest.mark.parametrize(("columns", "k"), [(1300, 20), (1311, 20), (64, 1), (79, 1), (2000, 200), (5, 5)])
def test_the_largest_of_long_rows_are_those_of_a_sort(columns, k):
    values = torch.randn(7, columns)
    best, places = knn.largest(values, k)
    assert torch.equal(best, values.sort(dim=1, descending=True).values[:, :k])
    assert torch.equal(values.gather(1, places), best)

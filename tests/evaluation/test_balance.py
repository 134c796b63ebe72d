"""Balanced accuracy against a slow loop, and when it is shown."""

import pytest
import torch

from mim.evaluation.balance import balanced_accuracy, balanced_of, images_per_class, uneven
from mim.evaluation.knn import accuracies, knn_answers


def test_balanced_accuracy_is_the_mean_over_classes_that_occur():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 80 + [2] * 15 + [3] * 5)
    answers = torch.randint(-1, 5, (100,), generator=generator)
    slow = sum(float((answers[labels == c] == c).double().mean()) for c in (0, 2, 3)) / 3
    assert balanced_accuracy(answers, labels) == pytest.approx(slow, abs=1e-12)
    known = answers.clamp(min=0)
    matrix = torch.zeros(5, 5, dtype=torch.int64)
    for truth, answer in zip(labels.tolist(), known.tolist(), strict=True):
        matrix[truth, answer] += 1
    assert balanced_of(matrix) == pytest.approx(balanced_accuracy(known, labels), abs=1e-12)


def test_one_large_class_alone_does_not_look_good():
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert balanced_accuracy(torch.zeros(100, dtype=torch.int64), labels) == 0.5


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 2], False),
        ([0, 0, 0, 1, 1, 2, 2], False),
        ([0, 0, 1, 2], True),
        ([0, 1], True),
        ([0, 1, 2, -1, -1], False),
    ],
)
def test_classes_are_uneven_if_one_is_half_again_as_large_or_absent(labels, expected):
    assert uneven(images_per_class(labels, ["a", "b", "c"])) is expected


def test_a_class_without_a_vote_is_no_answer():
    bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
    ranked = knn_answers(bank, labels, torch.eye(3)[:1], k=(1, 3), top=3)
    assert ranked[1].tolist() == [[0, -1, -1]]
    assert ranked[3][0, 0] == 0
    assert accuracies(ranked[1], torch.tensor([0]), (1, 3)) == {1: 1.0, 3: 1.0}

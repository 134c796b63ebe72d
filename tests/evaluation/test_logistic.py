import time

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mim.evaluation import linear_accuracy, logistic, logistic_regression, standardise, stratified_split


def features(rows, classes=5, dim=12, spread=1.0):
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(1))
    return (torch.randn(rows, dim) * spread + centres[labels]) * torch.linspace(0.1, 10, dim) + 3, labels


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_weights_equal_scikit_learns(l2):
    x, y = features(300)
    x = standardise(x, x)[0]
    reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000).fit(x.double().numpy(), y.numpy())
    weight = logistic_regression(x, y, l2)
    # float32 against float64: both at the optimum, which is flatter the weaker the penalty.
    torch.testing.assert_close(weight[:-1].T.double(), torch.from_numpy(reference.coef_), rtol=1e-2, atol=2e-3)
    centred = weight[-1] - weight[-1].mean()  # the biases' common shift changes no probability
    torch.testing.assert_close(centred.double(), torch.from_numpy(reference.intercept_), rtol=1e-2, atol=2e-3)


def test_accuracy_equals_scikit_learns():
    bank, bank_labels = features(300, spread=2.0)
    queries, labels = features(200, spread=2.0)
    scaler = StandardScaler().fit(bank.numpy())
    reference = LogisticRegression(C=1 / (1e-2 * 300), tol=1e-8, max_iter=5000)
    reference.fit(scaler.transform(bank.numpy()), bank_labels.numpy())
    expected = reference.score(scaler.transform(queries.numpy()), labels.numpy())
    assert 0.4 < expected < 0.95
    # One query in 200 may lie on a boundary.
    assert abs(linear_accuracy(bank, bank_labels, queries, labels, l2=(1e-2,)) - expected) <= 1 / 200


def test_features_in_pieces_give_the_same_weights(monkeypatch):
    x, y = features(100)
    x = standardise(x, x)[0]
    whole = logistic_regression(x, y, 1e-2)
    monkeypatch.setattr(logistic, "_ROWS", 33)
    torch.testing.assert_close(logistic_regression(x, y, 1e-2), whole, rtol=0, atol=1e-3)


def test_the_strength_is_chosen_without_the_queries():
    bank, bank_labels = features(200, dim=60, spread=4.0)
    queries, labels = features(100, dim=60, spread=4.0)
    strengths = (10.0, 1.0, 1e-4)
    each = {l2: linear_accuracy(bank, bank_labels, queries, labels, l2=(l2,)) for l2 in strengths}
    chosen, _ = logistic._best_l2(bank, bank_labels, strengths, seed=0)
    assert len(set(each.values())) == 3
    assert linear_accuracy(bank, bank_labels, queries, labels, l2=strengths) == each[chosen]
    shuffled = labels[torch.randperm(100)]
    as_chosen = linear_accuracy(bank, bank_labels, queries, shuffled, l2=(chosen,))
    assert linear_accuracy(bank, bank_labels, queries, shuffled, l2=strengths) == as_chosen


def test_the_strength_is_the_best_on_the_held_out_part():
    bank, labels = features(400, dim=60, spread=4.0)
    kept, held = stratified_split(labels, 0.1, 0, "linear probe")
    strengths = (10.0, 1.0, 1e-1, 1e-4)
    scores = [linear_accuracy(bank[kept], labels[kept], bank[held], labels[held], l2=(l2,)) for l2 in strengths]
    assert len(set(scores)) > 1
    assert logistic._best_l2(bank, labels, strengths, seed=0)[0] == strengths[scores.index(max(scores))]


def test_scores_repeat_exactly():
    bank, bank_labels = features(200, spread=3.0)
    queries, labels = features(100, spread=3.0)
    first = linear_accuracy(bank, bank_labels, queries, labels)
    torch.rand(3)  # the global generator has moved on
    assert linear_accuracy(bank, bank_labels, queries, labels) == first


def test_the_fit_is_the_same_in_inference_mode():
    bank, bank_labels = features(100)
    outside = linear_accuracy(bank, bank_labels, bank, bank_labels)
    with torch.inference_mode():
        assert linear_accuracy(bank.clone(), bank_labels, bank.clone(), bank_labels) == outside


def test_standardise_uses_the_bank_alone_and_leaves_constants_at_zero():
    bank = torch.tensor([[0.0, 5.0], [2.0, 5.0]])
    fitted, asked = standardise(bank, torch.tensor([[3.0, 5.0]]))
    torch.testing.assert_close(fitted, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(asked, torch.tensor([[2.0, 0.0]]), rtol=0, atol=1e-5)


def test_two_thousand_features_of_width_192_take_a_second():
    x, y = features(2000, classes=10, dim=192, spread=4.0)
    start = time.process_time()
    linear_accuracy(x, y, x, y)
    assert time.process_time() - start < 3  # measured 0.1 s; slack for shared cores

import pytest
import torch

from mim.evaluation import knn_accuracy, linear_accuracy, probe, probe_seeds


def features(rows, classes=4, spread=1.2):
    labels = torch.arange(rows) % classes
    return torch.eye(classes, 8)[labels] * 2 + torch.randn(rows, 8) * spread, labels


def test_a_probe_gives_both_accuracies():
    split = (*features(100), *features(60))
    scores = probe(*split)
    assert (scores["knn_top1"], scores["linear_top1"]) == (knn_accuracy(*split), linear_accuracy(*split))


def test_a_probe_gives_balanced_accuracies_by_the_answers_of_both():
    bank, queries = features(100), features(60)
    few = torch.cat([(queries[1] == 0).nonzero()[:, 0], (queries[1] == 1).nonzero()[:3, 0]])
    asked, truth = queries[0][few], queries[1][few]
    scores = probe(*bank, asked, truth)
    for kind, accuracy in (("knn", knn_accuracy), ("linear", linear_accuracy)):
        by_class = [accuracy(*bank, asked[truth == label], truth[truth == label]) for label in (0, 1)]
        assert scores[f"{kind}_balanced"] == pytest.approx(sum(by_class) / 2, abs=1e-12)


def test_seeds_vary_the_scores_and_repeat_them():
    split = (*features(100), *features(60))
    scores = probe_seeds(*split, seeds=range(4))
    assert probe_seeds(*split, seeds=range(4)) == scores
    assert probe_seeds(*split, seeds=[2])["knn_top1"] == scores["knn_top1"][2:3]
    for values in scores.values():
        assert len(values) == 4
        assert len(set(values)) > 1


def test_without_a_test_set_no_image_is_asked_about_itself():
    # Random labels: only an image found in the bank itself could be known.
    bank, labels = torch.randn(200, 32), torch.randint(4, (200,))
    assert knn_accuracy(bank, labels, bank, labels, k=1) == 1
    scores = probe_seeds(bank, labels, seeds=range(3))
    assert max(scores["knn_top1"] + scores["linear_top1"]) < 0.6


def test_informative_features_beat_noise_for_every_seed():
    bank, labels = features(200)
    trained, untrained = probe_seeds(bank, labels), probe_seeds(torch.randn(200, 8), labels)
    for name in trained:
        assert all(a > b for a, b in zip(trained[name], untrained[name], strict=True))

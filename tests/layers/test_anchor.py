import pytest
import torch

from mim.layers.anchor import AnchorConfig, feature_distance, gram_distance, weight_distance


def test_nothing_holds_unless_asked_for():
    assert not AnchorConfig().holds
    assert AnchorConfig(weights=0.1).holds
    assert not AnchorConfig(weights=0.1).looks
    assert AnchorConfig(gram=1.0).looks
    assert AnchorConfig(features=1.0).looks


def test_an_anchor_does_not_push_away():
    with pytest.raises(ValueError, match="an anchor has weights from 0"):
        AnchorConfig(gram=-1.0)


def test_the_distance_of_weights_pulls_each_back_by_its_own_difference():
    own, start = [torch.tensor([3.0, 1.0], requires_grad=True)], [torch.tensor([1.0, 1.0])]
    distance = weight_distance(own, start)
    distance.backward()
    assert distance == 2
    assert own[0].grad.tolist() == [2, 0]


def test_the_gram_distance_is_that_of_a_slow_loop_over_pairs_of_patches():
    own, other = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    total = 0.0
    for image in range(2):
        for a in range(5):
            for b in range(5):
                cosines = [torch.cosine_similarity(x[image, a], x[image, b], dim=0) for x in (own, other)]
                total += float(cosines[0] - cosines[1]) ** 2
    assert gram_distance(own, other).item() == pytest.approx(total / 50, rel=1e-4)


def test_only_similarities_count_for_the_gram_distance():
    features, turn = torch.randn(2, 5, 7), torch.linalg.qr(torch.randn(7, 7))[0]
    assert gram_distance(3 * features @ turn, features).item() == pytest.approx(0, abs=1e-10)
    assert feature_distance(3 * features @ turn, features) > 0.1


def test_the_feature_distance_is_zero_for_equal_directions_and_two_for_opposite_ones():
    features = torch.randn(2, 5, 7)
    assert feature_distance(3 * features, features).item() == pytest.approx(0, abs=1e-6)
    assert feature_distance(-features, features).item() == pytest.approx(2, abs=1e-6)


def test_similarities_are_compared_in_full_precision_under_autocast():
    own, other = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    expected = gram_distance(own, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gram_distance(own, other), expected)

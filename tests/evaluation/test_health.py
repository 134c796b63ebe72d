import math

import pytest
import torch

from mim.evaluation import feature_std, health_message, rankme


def test_rankme_of_equal_directions_is_their_number():
    basis = torch.linalg.qr(torch.randn(40, 8))[0]
    assert rankme(basis) == pytest.approx(8, rel=1e-4)
    assert rankme(basis[:, :3] @ torch.eye(3, 16)) == pytest.approx(3, rel=1e-3)


def test_rankme_equals_the_papers_formula():
    sigma = torch.tensor([4.0, 2.0, 1.0, 0.5])
    features = torch.linalg.qr(torch.randn(30, 4))[0] * sigma @ torch.linalg.qr(torch.randn(4, 4))[0]
    shares = [float(s / sigma.sum()) + 1e-7 for s in sigma]
    assert rankme(features) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-4)


def test_rankme_of_one_repeated_row_is_one():
    assert rankme(torch.randn(1, 16).expand(50, 16)) == pytest.approx(1, abs=1e-3)


def test_feature_std_is_one_when_spread_and_zero_when_collapsed():
    assert feature_std(torch.randn(4000, 16)) == pytest.approx(1, abs=0.02)
    assert feature_std(torch.randn(1, 16).expand(50, 16)) == pytest.approx(0, abs=1e-6)
    assert feature_std(torch.randn(1, 16)) == 0


def test_feature_std_ignores_length():
    directions = torch.ones(50, 16) * torch.rand(50, 1).add(0.1)
    assert feature_std(directions) == pytest.approx(0, abs=1e-6)


def test_message_names_a_collapse_below_five_percent():
    assert health_message(9.7, dim=192, images=1000) is None
    message = health_message(9.5, dim=192, images=1000)
    assert message is not None
    assert "9.5 of 192" in message


def test_few_images_are_no_collapse():
    assert health_message(9.5, dim=768, images=100) is None

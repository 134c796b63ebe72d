import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grouped import grouped

from mim.layers.sigreg import sigreg


def directions(width=4, count=5):
    return F.normalize(torch.randn(width, count), dim=0)


def test_it_equals_a_slow_loop_over_vectors_directions_and_knots():
    vectors, along = torch.randn(6, 2, 4), directions()
    statistics = []
    for place in range(2):
        for direction in along.T:
            projected, total = vectors[:, place] @ direction, 0.0
            for number in range(17):
                t = 3 * number / 16
                real = sum(math.cos(t * x) for x in projected) / 6 - math.exp(-t * t / 2)
                imaginary = sum(math.sin(t * x) for x in projected) / 6
                width = 3 / 16 * (0.5 if number in (0, 16) else 1)
                total += 2 * width * math.exp(-t * t / 2) * (real**2 + imaginary**2)
            statistics.append(6 * total)
    assert sigreg(vectors, along).item() == pytest.approx(sum(statistics) / len(statistics), rel=1e-5)


@pytest.mark.parametrize(
    "vectors", [torch.ones(512, 1, 4), torch.zeros(512, 1, 4), torch.randn(512, 1, 4) * 4], ids=["same", "zero", "wide"]
)
def test_vectors_that_are_not_normal_are_told_from_those_that_are(vectors):
    along = directions(count=32)
    assert sigreg(torch.randn(512, 1, 4), along) < 3 < 10 < sigreg(vectors, along)


def test_two_processes_have_the_value_and_the_gradient_of_one():
    vectors, along = torch.randn(6, 2, 4), directions()

    def work(rank):
        own = vectors[3 * rank : 3 * rank + 3].clone().requires_grad_()
        value = sigreg(own, along)
        value.backward()
        return value.item(), own.grad.numpy()

    whole = vectors.clone().requires_grad_()
    value = sigreg(whole, along)
    value.backward()
    parts = grouped(work)
    assert [part[0] for part in parts] == pytest.approx([value.item()] * 2, rel=1e-5)
    given = np.concatenate([part[1] for part in parts]) / 2  # DDP takes the mean over processes
    np.testing.assert_allclose(given, whole.grad, rtol=1e-4, atol=1e-6)

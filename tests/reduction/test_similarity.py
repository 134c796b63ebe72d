import pytest
import torch
from small_models import REDUCTIONS, build

from mim.reduction import KeepRate, Tokens
from mim.reduction.attention import Attending
from mim.reduction.similarity import product, squared_distances


def test_distances_are_those_of_torch():
    a, b = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    torch.testing.assert_close(squared_distances(a, b), torch.cdist(a, b).square())


def test_products_stay_exact_under_autocast():
    a, b = torch.randn(2, 5, 64), torch.randn(2, 64, 5)
    expected = a @ b
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(a, b), expected)
        assert (a @ b).dtype == torch.bfloat16


@pytest.mark.parametrize("name", REDUCTIONS)
def test_half_precision_chooses_the_same_tokens(name):
    """With the same queries and keys, autocast changes nothing about which of 196 patches go where."""
    vit = build("plain", img_size=112)
    x = torch.randn(2, 1 + 196, 16)
    attending = Attending(vit.blocks[0], 1)
    tokens = Tokens.start(attending.half(x), 1, (14, 14))
    reduction = REDUCTIONS[name](KeepRate(0.4, at=[0])).eval()
    count = reduction.left(196, 0, 4, (14, 14))
    exact = reduction.reduce(tokens, attending, count, 0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = reduction.reduce(tokens, attending, count, 0)
    assert torch.equal(ours.assign, exact.assign)
    assert torch.equal(ours.x, exact.x)

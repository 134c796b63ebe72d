import pytest
import torch
import torch.nn.functional as F
from small_models import build

from mim.reduction import Counts, GreedyDuplication, Tokens
from mim.reduction.attention import Attending
from mim.reduction.duplication import equal_parts


@pytest.mark.parametrize("count", [2, 5, 8])
def test_pivots_take_what_resembles_them_least_in_turn(count):
    block, x = build("plain").blocks[0], torch.randn(2, 1 + 12, 16)
    attending = Attending(block, 1)
    middle = attending.half(x)
    tokens = GreedyDuplication(Counts([count]), pivots=3).reduce(Tokens.start(middle, 1), attending, count, 0)
    for row in range(2):
        patches = F.normalize(middle[row, 1:], dim=-1)
        norms = attending.keys[row, :, 1:].abs().sum(dim=(0, 2))
        pivots = norms.argsort(descending=True)[: min(3, count)].tolist()
        kept = list(pivots)
        for pivot, share in zip(pivots, equal_parts(count - len(pivots), len(pivots)), strict=True):
            order = (patches @ patches[pivot]).argsort().tolist()
            kept += [n for n in order if n not in kept][:share]
        assert [n for n in range(12) if tokens.assign[row, n] >= 0] == sorted(kept)


def test_parts_differ_by_one_at_most():
    assert equal_parts(7, 3) == [2, 2, 3]
    assert equal_parts(0, 3) == [0, 0, 0]


def test_there_must_be_a_pivot():
    with pytest.raises(ValueError, match="pivots 0"):
        GreedyDuplication(Counts([1]), pivots=0)

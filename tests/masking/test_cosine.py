import math

import torch

from mim.masking import CosineMasking
from mim.randomness import RowGenerator


def test_shares_are_cosines_of_uniform_numbers():
    generator = RowGenerator.for_rows(0, 0, 2000)
    mask = CosineMasking()(2000, (8, 8), generator=generator)
    shares = RowGenerator.for_rows(0, 0, 2000).rand(1)[:, 0]
    assert mask.sum(1).tolist() == [max(1, math.ceil(64 * math.cos(u * math.pi / 2))) for u in shares.tolist()]
    assert abs(mask.float().mean().item() - 2 / math.pi) < 0.03


def test_something_is_hidden_of_every_image():
    assert CosineMasking()(500, (1, 1), generator=RowGenerator.for_rows(0, 0, 500)).all()
    assert torch.equal(CosineMasking()(500, (2, 2)).any(1), torch.ones(500).bool())

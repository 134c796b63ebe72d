import math

import pytest
import torch
from torch import nn

from mim.layers.initialisation import initialise


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 64, 8)
        self.map = nn.Linear(200, 300)
        self.free = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 512))
        self.pos_embed = nn.Parameter(torch.full((1, 4, 8), 5.0))


def test_matrices_are_xavier_uniform_tokens_normal_and_the_rest_is_left_alone():
    part = Part()
    bias = part.embed.bias.clone()
    initialise(part)
    for weight, (inputs, outputs) in {part.map.weight: (200, 300), part.embed.weight: (192, 64)}.items():
        bound = math.sqrt(6 / (inputs + outputs))
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert part.mask_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert not part.map.bias.any()
    assert torch.equal(part.embed.bias, bias)
    assert part.norm.weight.eq(1).all()
    assert part.pos_embed.eq(5).all()

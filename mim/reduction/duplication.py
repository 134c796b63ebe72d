"""Pruning by duplication, pivot by pivot, as DART does it (arXiv:2502.11494)."""

import math

import torch
import torch.nn.functional as F

from mim.reduction.attention import Attending
from mim.reduction.base import TokenReduction
from mim.reduction.pruning import split
from mim.reduction.schedule import Schedule
from mim.reduction.similarity import product
from mim.reduction.tokens import Tokens


class GreedyDuplication(TokenReduction):
    """Each pivot in turn keeps the tokens that resemble it least; pivots have the largest keys and stay.

    The paper prunes visual tokens of a language model and takes half of its pivots from the text; here all are patches.
    :class:`mim.reduction.Duplication` asks all pivots at once, without a loop.

    Args:
        schedule: how many tokens each block leaves.
        pivots: how many; the paper has 4 in the image.
    """

    def __init__(self, schedule: Schedule, pivots: int = 4) -> None:
        super().__init__(schedule)
        if pivots < 1:
            raise ValueError(f"pivots {pivots}: there must be one at least")
        self.pivots = pivots

    def cost(self, before: int, after: int, dim: int, head_dim: int) -> int:
        """Cosines to the pivots."""
        return min(self.pivots, after) * before * dim

    def reduce(self, tokens: Tokens, attending: Attending | None, count: int, layer: int) -> Tokens:
        """See :meth:`TokenReduction.reduce`."""
        assert attending is not None
        pivots = min(self.pivots, count)
        chosen = attending.key_norms().topk(pivots).indices  # (B, pivots)
        unit = F.normalize(tokens.patches.detach().float(), dim=-1)
        of_pivots = unit.gather(1, chosen[..., None].expand(-1, -1, unit.shape[2]))
        cosines = product(unit, of_pivots.transpose(1, 2))  # (B, K, pivots)
        taken = torch.zeros_like(cosines[..., 0]).scatter(1, chosen, 1.0)  # (B, K)
        for number, share in enumerate(equal_parts(count - pivots, pivots)):
            free = cosines[..., number].masked_fill(taken > 0, math.inf)
            taken = taken.scatter(1, free.topk(share, largest=False).indices, 1.0)
        return tokens.keep(*split(taken, count))


def equal_parts(whole: int, parts: int) -> list[int]:
    """``whole`` as a sum of ``parts`` numbers that differ by one at most."""
    return [whole * (part + 1) // parts - whole * part // parts for part in range(parts)]

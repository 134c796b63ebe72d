"""DynamicViT: small networks decide before some blocks which tokens go on (arXiv:2106.02034).

Deviations: counts are rounded up stage by stage, as everywhere in this folder, where the paper rounds down shares of
the whole sequence. Its distillation from the model without pruning is :mod:`mim.reduction.distillation`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.reduction.attention import Attending
from mim.reduction.base import TokenReduction
from mim.reduction.pruning import split
from mim.reduction.schedule import KeepRate
from mim.reduction.tokens import Tokens


class DynamicViT(TokenReduction):
    """Keeps the tokens that a predictor asks for, trained with the model.

    In training every token draws from its own probability whether it stays, and those that leave are hidden from the
    others, not taken out; in evaluation a fixed number is taken out.

    Args:
        dim: width of the model.
        keep: share of the tokens that each stage keeps.
        at: blocks after which the stages stand, so that the next one has fewer tokens; (2, 5, 8) of 12 in the paper.
        weight: in the loss of the difference to the share that should stay; 2 in the paper, 5 for DeiT-B.
    """

    reads_attention = False

    def __init__(self, dim: int, keep: float, at: Sequence[int], weight: float = 2.0) -> None:
        super().__init__(KeepRate(keep, at), place="after")
        self.dim, self.keep, self.at, self.weight = dim, keep, tuple(at), weight
        self.predictors = nn.ModuleList(Predictor(dim) for _ in self.at)

    def cost(self, before: int, after: int, dim: int, head_dim: int) -> int:
        """Four layers of the predictor."""
        return before * (dim * dim + dim * (dim // 2) + (dim // 2) * (dim // 4) + (dim // 4) * 2)

    def reduce(self, tokens: Tokens, attending: Attending | None, count: int, layer: int) -> Tokens:
        """See :meth:`TokenReduction.reduce`."""
        stage = self.at.index(layer)
        stay = self.predictors[stage](tokens.patches, tokens.alive)  # (B, K, 2) logarithms: stays, leaves
        if not self.training:
            return tokens.keep(*split(stay[..., 0].float(), count))
        alive = F.gumbel_softmax(stay.float(), hard=True)[..., 0]
        alive = alive if tokens.alive is None else alive * tokens.alive
        difference = alive.mean(dim=1) - self.keep ** (stage + 1)  # (B,)
        return replace(tokens, alive=alive, auxiliary=(*tokens.auxiliary, difference))

    def auxiliary_loss(self, tokens: Tokens, labels: Tensor) -> Tensor:
        """How far the shares that stay are from those that should, squared, mean over stages and images."""
        if not tokens.auxiliary:
            return super().auxiliary_loss(tokens, labels)
        return self.weight * torch.stack(tokens.auxiliary).square().mean()


class Predictor(nn.Module):
    """Whether tokens should stay, judged by their own features and the mean of those that are left.

    Args:
        dim: width of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.decide = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )

    def forward(self, patches: Tensor, alive: Tensor | None = None) -> Tensor:
        """Patch tokens ``(B, K, D)`` to logarithms of the probabilities to stay and to leave, ``(B, K, 2)``.

        Args:
            patches: all tokens.
            alive: ``(B, K)``, which of them count in the mean; all if not given.
        """
        own, shared = self.embed(patches).chunk(2, dim=2)
        weight = torch.ones_like(own[..., :1]) if alive is None else alive[..., None].to(own.dtype)
        mean = (weight * shared).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1e-6)
        logits: Tensor = self.decide(torch.cat([own, mean.expand(-1, own.shape[1], -1)], dim=2))
        return logits.log_softmax(dim=2)

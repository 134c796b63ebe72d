"""Learned thresholds: a token stays while the others attend to it enough (LTP, arXiv:2107.00910).

How many stay is up to each image, so tokens are hidden, not taken out: nothing runs faster until
:meth:`LearnedThresholds.static` turns what was learnt into fixed numbers.

Deviations: the paper prunes words of BERT and counts attention of padding, too, which makes its thresholds depend on
the length of a batch; here only live patches are asked. Prefix tokens are neither asked nor ever hidden. The threshold
of the first block, which the official code leaves at 0, learns here, too.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.reduction.attention import Attending
from mim.reduction.base import TokenReduction
from mim.reduction.pruning import TopKPruning
from mim.reduction.schedule import Counts, KeepRate
from mim.reduction.scores import ReceivedAttention
from mim.reduction.tokens import Tokens


class LearnedThresholds(TokenReduction):
    """Hides tokens that receive less attention than a threshold of their block.

    In training the output of a block is multiplied by a soft mask, through which thresholds learn; the share of tokens
    that stay is part of the loss. In evaluation, and in training with ``hard``, masks are hard. Scoring takes whole
    attention matrices.

    Args:
        depth: blocks of the model.
        weight: of the mean share of tokens that stay, summed over blocks, in the loss; 0.01 to 0.2 in the paper.
        temperature: of the soft mask; 1e-5 to 2e-3 in the paper.
        hard: the second stage of training: masks are hard, thresholds stay as they are.
    """

    def __init__(self, depth: int, weight: float = 0.1, temperature: float = 1e-3, hard: bool = False) -> None:
        super().__init__(KeepRate(1.0), "middle" if hard else "after")
        if weight < 0 or temperature <= 0:
            raise ValueError(f"weight {weight} and temperature {temperature} must be positive")
        self.depth, self.weight, self.temperature, self.hard = depth, weight, temperature, hard
        self.thresholds = nn.Parameter(0.01 * torch.arange(depth) / depth)

    def train(self, mode: bool = True) -> "LearnedThresholds":
        """Soft masks multiply what a block gives, hard ones hide tokens already from its MLP."""
        self.place = "after" if mode and not self.hard else "middle"
        return super().train(mode)

    def acts(self, before: int, after: int, layer: int) -> bool:
        """Every block looks at its tokens."""
        return True

    def reduce(self, tokens: Tokens, attending: Attending | None, count: int, layer: int) -> Tokens:
        """See :meth:`TokenReduction.reduce`."""
        assert attending is not None
        scores = attending.received_attention(alive=tokens.alive)  # (B, K)
        threshold = self.thresholds[layer]
        if self.training and not self.hard:
            stays = ((scores - threshold) / self.temperature).sigmoid()
            mask = F.pad(stays, (tokens.num_prefix, 0), value=1.0)[..., None].to(tokens.x.dtype)
            return replace(tokens, x=tokens.x * mask, auxiliary=(*tokens.auxiliary, stays.mean(dim=1)))
        best = scores == scores.amax(dim=1, keepdim=True)  # one stays whatever the threshold
        return tokens.hiding((scores >= threshold.clamp(min=1e-5)) | best)

    def auxiliary_loss(self, tokens: Tokens, labels: Tensor) -> Tensor:
        """The share of tokens that stay, summed over blocks, times the weight."""
        shares = [share.mean() for share in tokens.auxiliary]
        return self.weight * torch.stack(shares).sum() if shares else super().auxiliary_loss(tokens, labels)

    @torch.no_grad()
    def static(self, blocks: nn.Sequential, x: Tensor, num_prefix: int, rope: Tensor | None = None) -> TokenReduction:
        """The same score with fixed numbers: those that stay on average over a batch."""
        states = self.eval().after_blocks(range(len(blocks)), blocks, x, num_prefix, rope=rope)
        shares = [state.alive.float().mean().item() for state in states if state.alive is not None]
        return TopKPruning(
            Counts([max(1, round(share * states[0].count)) for share in shares]), ReceivedAttention(None)
        )

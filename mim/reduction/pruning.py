"""Pruning: the tokens with the best scores go on, the others are dropped, or fused into one."""

from typing import Literal

from torch import Tensor

from mim.patches import gather_tokens
from mim.reduction.attention import Attending
from mim.reduction.base import TokenReduction
from mim.reduction.schedule import Schedule
from mim.reduction.scores import Score
from mim.reduction.tokens import Tokens


class TopKPruning(TokenReduction):
    """Keeps the tokens with the best scores, in raster order.

    Args:
        schedule: how many each block keeps.
        score: what makes a token worth keeping.
        fuse: the others also become one extra token, their sum weighted by the score, as in EViT (arXiv:2202.07800). It
            counts as an ordinary token at the next reduction, but stands for no patch: it has no rotary position, and
            means and dense features go by the patches themselves.
        normalise: the extra token is a mean, not the sum, whose weights add to less than 1.
        place: reduce in the ``middle`` of a block or ``after`` it.
        rejoin: all patches come back before the last block.
    """

    def __init__(
        self,
        schedule: Schedule,
        score: Score,
        fuse: bool = False,
        normalise: bool = False,
        place: Literal["middle", "after"] = "middle",
        rejoin: bool = False,
    ) -> None:
        super().__init__(schedule, place, rejoin=rejoin)
        if fuse and not score.positive:
            raise ValueError(f"{type(score).__name__} can be negative, so tokens cannot be fused by it")
        self.score, self.fuse, self.normalise = score, fuse, normalise
        self.reads_attention = score.reads_attention
        self.needs_class_token = score.needs_class_token

    def left(self, patches: int, layer: int, depth: int, grid: tuple[int, int] | None) -> int:
        """The fused token comes on top of those that the schedule keeps."""
        kept = super().left(patches, layer, depth, grid)
        return kept if kept == patches else min(patches, kept + self.fuse)

    def cost(self, before: int, after: int, dim: int, head_dim: int) -> int:
        """That of the score."""
        return self.score.cost(before, dim, head_dim)

    def reduce(self, tokens: Tokens, attending: Attending | None, count: int, layer: int) -> Tokens:
        """See :meth:`TokenReduction.reduce`."""
        scores = self.score(tokens, attending, layer).detach()  # (B, K)
        kept, dropped = split(scores, count - self.fuse)
        shorter = tokens.keep(kept, dropped)
        return shorter.extended(self._fused(tokens, scores, dropped)) if self.fuse else shorter

    def _fused(self, tokens: Tokens, scores: Tensor, dropped: Tensor) -> Tensor:
        """The tokens ``dropped (B, R)`` as one, ``(B, 1, D)``."""
        weight = scores.gather(1, dropped)
        weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-12) if self.normalise else weight
        lost = gather_tokens(tokens.patches, dropped)
        return (weight[..., None].to(lost.dtype) * lost).sum(dim=1, keepdim=True)


def split(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best of every row of ``scores (B, K)`` and the rest, both in raster order."""
    order = scores.topk(scores.shape[1]).indices  # torch's stable sort, the other way to order, has no ONNX form
    return order[:, :count].sort().values, order[:, count:].sort().values

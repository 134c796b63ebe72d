"""Early exit for segmentation: patches whose class is clear leave with their answer (DToP, arXiv:2308.01045).

Deviations: the paper's heads are those of SegViT, a class probability times a mask; here each is a norm and a linear
map, and a token is as sure as its most probable class. With a schedule instead of a threshold the surest tokens leave,
equally many of each image, so that sequences do get shorter; the paper's count differs from image to image.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mim.patches import gather_tokens
from mim.reduction.attention import Attending
from mim.reduction.base import TokenReduction
from mim.reduction.masks import mask_cross_entropy
from mim.reduction.pruning import split
from mim.reduction.schedule import KeepRate
from mim.reduction.tokens import Tokens


class EarlyExit(TokenReduction):
    """Classifies patches on the way; those it is sure of keep this answer and go no further.

    Of every class that is answered, the surest few stay as context for the others.

    Args:
        dim: width of the model.
        num_classes: of the pixels.
        at: blocks after which heads stand; (7, 15) of 24 or (5, 7) of 12 in the paper.
        keep: share of the tokens that each of them keeps.
        threshold: hide what is surer than this instead, however many there are; 0.9 for ViT-B and 0.95 for ViT-L in the
            paper. Nothing runs faster then.
        context: tokens of every class that stay.
        weight: of the heads' cross-entropy in the loss.
    """

    reads_attention = False

    def __init__(
        self,
        dim: int,
        num_classes: int,
        at: Sequence[int],
        keep: float = 0.7,
        threshold: float | None = None,
        context: int = 5,
        weight: float = 1.0,
    ) -> None:
        super().__init__(KeepRate(1.0 if threshold else keep, at), place="after")
        self.dim, self.num_classes, self.at, self.keep = dim, num_classes, tuple(at), keep
        self.threshold, self.context, self.weight = threshold, context, weight
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes)) for _ in self.at)

    def cost(self, before: int, after: int, dim: int, head_dim: int) -> int:
        """The linear map of a head."""
        return before * dim * self.heads[0][1].out_features  # type: ignore[index,no-any-return]

    def acts(self, before: int, after: int, layer: int) -> bool:
        """Where heads stand, also if none of their tokens is taken out."""
        return layer in self.at if self.threshold else super().acts(before, after, layer)

    def reduce(self, tokens: Tokens, attending: Attending | None, count: int, layer: int) -> Tokens:
        """See :meth:`TokenReduction.reduce`."""
        logits = self.heads[self.at.index(layer)](tokens.patches)  # (B, K, classes)
        canvas = self._canvas(tokens, logits)
        sure = logits.detach().float().softmax(dim=2).amax(dim=2)  # (B, K)
        sure = sure if tokens.alive is None else sure * tokens.alive
        stays = self._context(logits.detach(), sure)
        if self.threshold:
            tokens = tokens.hiding(stays | (sure <= self.threshold))
        else:
            tokens = tokens.keep(*split(torch.where(stays, 1.0, -sure), count))
        auxiliary = (*tokens.auxiliary, canvas) if self.training else ()
        return replace(tokens, canvas=canvas, auxiliary=auxiliary)

    def _canvas(self, tokens: Tokens, logits: Tensor) -> Tensor:
        """The latest answer for every patch, ``(B, N, classes)``: that of this head where the patch is still there."""
        latest = gather_tokens(logits, tokens.assign.clamp(min=0))
        return latest if tokens.canvas is None else torch.where(tokens.gone[..., None], tokens.canvas, latest)

    def _context(self, logits: Tensor, sure: Tensor) -> Tensor:
        """The surest tokens of every class, ``(B, K)`` bool."""
        own = logits.argmax(dim=2)[:, None] == torch.arange(logits.shape[2], device=logits.device)[:, None]
        ranked = torch.where(own, sure[:, None], -1.0)  # (B, classes, K)
        best = ranked.topk(min(self.context, sure.shape[1]), dim=2)
        chosen = torch.zeros_like(ranked).scatter(2, best.indices, (best.values >= 0).float())
        return chosen.amax(dim=1) > 0

    def auxiliary_loss(self, tokens: Tokens, labels: Tensor) -> Tensor:
        """Cross-entropy of every head's answers together with those of patches that had left before."""
        if not tokens.auxiliary or tokens.grid is None:
            return super().auxiliary_loss(tokens, labels)
        losses = [mask_cross_entropy(canvas, tokens.grid, labels) for canvas in tokens.auxiliary]
        return self.weight * torch.stack(losses).sum()

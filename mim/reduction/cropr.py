"""Cropr: the tokens that a small classifier looks at go on, the others wait for the last block (arXiv:2412.00965).

In training each reducing block has a router, whose queries read all tokens and classify the image; its gradient does
not reach the backbone. Without projections, the score of a patch is a product with the sum of the queries: in
evaluation one vector per block is all that is left of the router.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from timm.layers.weight_init import trunc_normal_, trunc_normal_tf_
from torch import Tensor, nn

from mim.reduction.attention import Attending
from mim.reduction.base import TokenReduction
from mim.reduction.masks import patch_cross_entropy
from mim.reduction.pruning import split
from mim.reduction.schedule import PerBlock
from mim.reduction.similarity import product
from mim.reduction.tokens import Tokens


class Cropr(TokenReduction):
    """Prunes by what helps to classify, learnt beside fine-tuning, and fuses all patches in the last block.

    The first block takes one patch more, as in the reference, which counts the class token. Stochastic depth of the
    last block stays as the model has it; the reference turns it off there.

    Args:
        dim: width of the model.
        depth: its blocks.
        num_classes: of the auxiliary classifiers.
        r: patches that each block but the last two takes away; the paper has 8 for ViT-L at 224 px.
        queries: of each router; 1 for classification, one per patch for masks.
        masks: classes are those of pixels: each query answers for the patch of its number, whose class is that of its
            first pixel, as in the reference.
    """

    reads_attention = False

    def __init__(
        self, dim: int, depth: int, num_classes: int, r: int = 8, queries: int = 1, masks: bool = False
    ) -> None:
        super().__init__(PerBlock(r, stop=2), place="after", rejoin=True)
        self.dim, self.depth, self.num_classes, self.r = dim, depth, num_classes, r
        self.queries, self.masks = queries, masks
        self.routers = nn.ModuleList(_Router(dim, num_classes, queries) for _ in range(depth - 2))

    def left(self, patches: int, layer: int, depth: int, grid: tuple[int, int] | None) -> int:
        """One less after the first block."""
        left = super().left(patches, layer, depth, grid)
        return max(1, left - 1) if layer == 0 and left < patches else left

    def cost(self, before: int, after: int, dim: int, head_dim: int) -> int:
        """A product with one vector."""
        return before * dim

    def reduce(self, tokens: Tokens, attending: Attending | None, count: int, layer: int) -> Tokens:
        """See :meth:`TokenReduction.reduce`."""
        router = self.routers[layer]
        everything = tokens.x.detach()
        if self.training:
            tokens = replace(tokens, auxiliary=(*tokens.auxiliary, router(everything, tokens.num_prefix)))
        patches = everything[:, tokens.num_prefix :]
        return tokens.keep(*split(product(patches, router.scorer), count))  # type: ignore[arg-type]

    def auxiliary_loss(self, tokens: Tokens, labels: Tensor) -> Tensor:
        """Cross-entropy of every router, summed."""
        losses = [self._loss(logits, tokens, labels) for logits in tokens.auxiliary]
        return torch.stack(losses).sum() if losses else super().auxiliary_loss(tokens, labels)

    def _loss(self, logits: Tensor, tokens: Tokens, labels: Tensor) -> Tensor:
        if not self.masks:
            return F.cross_entropy(logits.mean(dim=1), labels)
        assert tokens.grid is not None
        return patch_cross_entropy(logits, tokens.grid, labels)


class _Router(nn.Module):
    """Queries that read the tokens in one head without projections, a residual MLP, and a classifier.

    Weights that were saved before the MLP had its norm (version 0.1) run as they were trained: without it, and without
    the class token among what is read.
    """

    def __init__(self, dim: int, num_classes: int, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, dim))
        trunc_normal_tf_(self.queries, std=dim**-0.5)
        self.mlp_norm: nn.LayerNorm | None = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def scorer(self) -> Tensor:
        """``(D,)``: scores are logits summed over queries, which is one product with their sum."""
        return self.queries.sum(dim=0)

    def forward(self, tokens: Tensor, num_prefix: int) -> Tensor:
        """Class logits ``(B, queries, num_classes)`` of tokens ``(B, P + K, D)``."""
        if self.mlp_norm is None:
            tokens = tokens[:, num_prefix:]
        queries = self.queries.expand(tokens.shape[0], -1, -1)
        read = F.scaled_dot_product_attention(queries, tokens, tokens)  # (B, queries, D)
        residual = self.mlp(read if self.mlp_norm is None else self.mlp_norm(read))
        logits: Tensor = self.head(self.norm(read + residual))
        return logits

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:  # noqa: ANN401
        if f"{prefix}queries" in state_dict and f"{prefix}mlp_norm.weight" not in state_dict:
            self.mlp_norm = None
        super()._load_from_state_dict(state_dict, prefix, *rest)

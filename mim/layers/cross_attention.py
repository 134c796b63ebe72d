"""Blocks of cross-attention: queries look at other tokens and never at each other (CrossMAE, arXiv:2401.14391)."""

import torch.nn.functional as F
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Attention of queries to a context of another width.

    Args:
        width: of the queries and of the result, ``E``.
        heads: attention heads.
        context_dim: width of the context, ``D``; that of the queries if not given.
    """

    def __init__(self, width: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"cross-attention of width {width} cannot have {heads} heads")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.keys_values = nn.Linear(context_dim or width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """``(B, M, E)`` that look at ``(B, K, D)``, to ``(B, M, E)``."""
        parts = (self.query(queries), *self.keys_values(context).chunk(2, dim=2))
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended: Tensor = self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return attended


class CrossBlock(nn.Module):
    """Norm, cross-attention, norm, MLP. What one query becomes does not depend on the others.

    Args:
        width: of the queries, ``E``.
        heads: attention heads.
        context_dim: width of the context, ``D``, which is used as it is; that of the queries if not given.
        mlp_ratio: width of the hidden layer over ``E``.
    """

    def __init__(self, width: int, heads: int, context_dim: int | None = None, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = CrossAttention(width, heads, context_dim)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """``(B, M, E)`` that look at ``(B, K, D)``, to ``(B, M, E)``."""
        queries = queries + self.attn(self.norm1(queries), context)
        refined: Tensor = queries + self.mlp(self.norm2(queries))
        return refined

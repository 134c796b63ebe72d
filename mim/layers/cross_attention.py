"""Blocks of cross-attention: queries look at other tokens and never at each other (CrossMAE, arXiv:2401.14391)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from mim.layers.positions import sincos_positions


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


class Mix(nn.Module):
    """Linear combinations of the tokens of several layers, each behind a norm of its own.

    Args:
        dim: width ``D`` of the tokens.
        layers: how many there are to combine, ``k``.
        count: how many combinations are wanted.
    """

    def __init__(self, dim: int, layers: int, count: int) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.empty(count, layers).normal_(std=layers**-0.5))
        self.norms = nn.ModuleList(LayerNorm(dim) for _ in range(count))

    def forward(self, layers: Sequence[Tensor]) -> list[Tensor]:
        """``k`` times ``(B, K, D)`` to as many of the same shape as there are combinations."""
        mixed = torch.einsum("ck,kbnd->cbnd", self.shares, torch.stack(list(layers)))
        return [norm(tokens) for norm, tokens in zip(self.norms, mixed, strict=True)]


class CrossDecoder(nn.Module):
    """Predicts patches one by one from what the encoder saw: mask tokens that look at its tokens, never at each other.

    Args:
        dim: encoder width ``D``.
        grid: ``(h, w)`` patches per side.
        out_dim: values predicted for a patch; None for the normed queries themselves.
        width: decoder width ``E``.
        depth: number of blocks.
        heads: attention heads.
        mixed: layers of the encoder that every block sees its own combination of; 1 for the last one alone.
    """

    positions: Tensor

    def __init__(
        self, dim: int, grid: tuple[int, int], out_dim: int | None, width: int, depth: int, heads: int, mixed: int = 1
    ) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.register_buffer("positions", sincos_positions(grid, width)[0], persistent=False)  # (N, E)
        self.mix = Mix(dim, mixed, depth) if mixed > 1 else None
        self.blocks = nn.ModuleList(CrossBlock(width, heads, dim) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.predict = nn.Identity() if out_dim is None else nn.Linear(width, out_dim)

    def forward(self, layers: Sequence[Tensor], indices: Tensor) -> Tensor:
        """Patches ``indices (B, M)`` from tokens ``(B, P + K, D)`` of each mixed layer: ``(B, M, out_dim or E)``."""
        contexts = self.mix(layers) if self.mix else [layers[-1]] * len(self.blocks)
        queries = self.mask_token + F.embedding(indices, self.positions)  # (B, M, E)
        for block, context in zip(self.blocks, contexts, strict=True):
            queries = block(queries, context)
        prediction: Tensor = self.predict(self.norm(queries))
        return prediction

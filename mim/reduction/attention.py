"""A timm block in two halves, and what its attention has computed on the way: queries and keys, at no extra cost.

The one file of this folder that knows the insides of timm's blocks.
"""

from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mim.reduction.similarity import product

HALVED = (Block, EvaBlock)
"""Blocks that are attention, then an MLP, each behind its own norm and added to its input."""
READ = (Attention, AttentionRope, EvaAttention)
"""Attentions whose queries and keys pass through ``q_norm`` and ``k_norm``."""


def can_be_halved(block: nn.Module) -> bool:
    """Whether a block can be taken apart by :class:`Attending` and :func:`mlp_half`."""
    return type(block) in HALVED and type(block.attn) in READ


def check_block(block: nn.Module) -> None:
    """Refuses blocks that cannot be taken apart.

    Raises:
        TypeError: naming the block's type.
    """
    inner = getattr(block, "attn", block)
    if not can_be_halved(block):
        raise TypeError(
            f"blocks of type {type(block).__name__} with {type(inner).__name__} cannot be reduced in their middle or "
            "by attention; use a score that reads no attention, with place='after'"
        )


class Attending:
    """Runs a block's attention as timm does, fused if timm fuses it, and remembers its queries and keys.

    Args:
        block: of a type that :func:`check_block` accepts.
        num_prefix: prefix tokens ``P``.
    """

    queries: Tensor
    keys: Tensor

    def __init__(self, block: nn.Module, num_prefix: int) -> None:
        self.block: Any = block  # whatever timm builds blocks from
        self.num_prefix = num_prefix
        self.inputs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the attention module holds
        """Stands in for the attention module."""
        return getattr(self.block.attn, name)

    def q_norm(self, queries: Tensor) -> Tensor:
        """Called by timm's attention with ``(B, heads, P + K, d)``, before rotary positions."""
        self.queries = self.block.attn.q_norm(queries)
        return self.queries

    def k_norm(self, keys: Tensor) -> Tensor:
        """As :meth:`q_norm`, for keys."""
        self.keys = self.block.attn.k_norm(keys)
        return self.keys

    def half(self, x: Tensor, **inputs: Any) -> Tensor:  # noqa: ANN401 - handed on to timm
        """The first half of the block, ``(B, P + K, D)`` to the same shape."""
        self.inputs = inputs
        # timm's own forward with this object as its ``self``: hooks would have to be cleaned up, and do not compile.
        attended = type(self.block.attn).forward(self, self.block.norm1(x), **inputs)
        return x + branch(self.block, attended, 1)

    def class_attention(self) -> Tensor:
        """Attention of the first prefix token to the patch tokens, ``(B, K)``, mean over heads.

        Softmax runs over all tokens, so rows sum to less than 1; it is taken before dropout, in float32.
        """
        return self.head_attention().mean(dim=1)

    def head_attention(self) -> Tensor:
        """As :meth:`class_attention`, head by head: ``(B, heads, K)``."""
        return self._attention(self.queries[:, :, :1])[:, :, 0]

    def whole_attention(self) -> Tensor:
        """Attention of every token to every token, ``(B, heads, P + K, P + K)`` float32; rows sum to 1."""
        prefix, queries = self.num_prefix, self.queries
        if (rope := self.inputs.get("rope")) is not None:
            queries = torch.cat([queries[:, :, :prefix], self._turn(queries[:, :, prefix:], rope)], dim=2)
        return self._softmax(queries)

    def received_attention(self, rows: int | None = None, alive: Tensor | None = None) -> Tensor:
        """Attention that each patch token receives, ``(B, K)``: mean over heads and the patches that are asked.

        Args:
            rows: how many are asked, evenly spread; all unless given.
            alive: ``(B, K)`` bool, those whose attention counts.
        """
        patches = self.queries.shape[2] - self.num_prefix
        stride = max(1, patches // (rows or patches))
        asking = self.num_prefix + torch.arange(0, patches, stride, device=self.queries.device)[:rows]
        attention = self._attention(self.queries[:, :, asking], asking - self.num_prefix).mean(dim=1)  # (B, rows, K)
        if alive is None:
            return attention.mean(dim=1)
        weight = alive[:, asking - self.num_prefix, None].to(attention.dtype)
        return (weight * attention).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def mean_keys(self) -> Tensor:
        """Keys of the patch tokens, mean over heads, ``(B, K, d)`` float32; what ToMe calls the metric."""
        return self.keys[:, :, self.num_prefix :].float().mean(dim=1)

    def key_norms(self) -> Tensor:
        """L1 norm of the keys of all heads together, ``(B, K)``."""
        return self.keys[:, :, self.num_prefix :].float().abs().sum(dim=(1, 3))

    def _attention(self, queries: Tensor, patches: Tensor | None = None) -> Tensor:
        """Softmax rows ``(B, heads, Q, K)`` of chosen queries; ``patches (Q,)`` names them unless they are prefix."""
        if (rope := self.inputs.get("rope")) is not None and patches is not None:
            queries = self._turn(queries, rope[..., patches, :])
        return self._softmax(queries)[..., self.num_prefix :]

    def _softmax(self, queries: Tensor) -> Tensor:
        """Rows ``(B, heads, Q, P + K)`` of queries that have been turned to their places."""
        keys = self.keys
        if (rope := self.inputs.get("rope")) is not None:
            keys = torch.cat([keys[:, :, : self.num_prefix], self._turn(keys[:, :, self.num_prefix :], rope)], dim=2)
        if (groups := queries.shape[1] // keys.shape[1]) > 1:
            keys = keys.repeat_interleave(groups, dim=1)
        logits = product(queries * self.scale, keys.transpose(-2, -1))
        if (bias := self.inputs.get("attn_mask")) is not None:
            logits = logits + bias.float()
        return logits.softmax(dim=-1)

    def _turn(self, vectors: Tensor, rope: Tensor) -> Tensor:
        turned: Tensor = apply_rot_embed_cat(vectors, rope, half=getattr(self, "rotate_half", False))
        return turned


def mlp_half(block: nn.Module, x: Tensor) -> Tensor:
    """The second half of a block, ``(B, P + K, D)`` to the same shape."""
    return x + branch(block, block.mlp(block.norm2(x)), 2)  # type: ignore[operator]


def branch(block: nn.Module, x: Tensor, number: int) -> Tensor:
    """Layer scale and stochastic depth of one half, under the names that timm's two kinds of block have for them."""
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f"gamma_{number}")
        x = x if gamma is None else gamma * x
    else:
        x = getattr(block, f"ls{number}")(x)
    dropped: Tensor = getattr(block, f"drop_path{number}")(x)
    return dropped

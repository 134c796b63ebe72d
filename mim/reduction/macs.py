"""Multiply-adds of a ViT, block by block, with and without a reduction.

Counted are all matrix products; norms, softmax, activations, gathers and sorts are not. What papers on token reduction
call GFLOPs are these numbers; a counter of floating-point operations shows twice as much.
"""

from typing import Any, NamedTuple

from torch import nn

from mim.reduction.base import TokenReduction


class Macs(NamedTuple):
    """Multiply-adds per image.

    Args:
        blocks: of the transformer blocks.
        reduction: of the reduction itself.
        rest: of patch embedding, pooling and head.
    """

    blocks: int
    reduction: int
    rest: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.blocks + self.reduction + self.rest


def count_macs(vit: Any, reduction: TokenReduction | None = None, patches: int | None = None) -> Macs:  # noqa: ANN401
    """What one image costs.

    Args:
        vit: a timm ViT, at the size it was built for.
        reduction: as it runs inside.
        patches: patch tokens that enter the first block, if some were dropped before it.
    """
    blocks, grid, prefix = list(vit.blocks), vit.patch_embed.grid_size, vit.num_prefix_tokens
    whole = grid[0] * grid[1]
    before = whole if patches is None else patches
    after = [before] * len(blocks) if reduction is None else reduction.counts(before, len(blocks), grid)
    dim, head_dim = vit.embed_dim, blocks[0].attn.head_dim
    total = own = 0
    for layer, (block, left) in enumerate(zip(blocks, after, strict=True)):
        if reduction is not None and reduction.rejoin and layer == len(blocks) - 1:
            before = left = whole
        if reduction is not None and left < before:
            own += reduction.cost(before, left, dim, head_dim)
        late = reduction is not None and reduction.place == "after"
        total += _block(block, prefix + before, prefix + (before if late else left))
        before = left
    rest = vit.patch_embed.proj.weight.numel() * whole + _linears(vit.head) + _linears(getattr(vit, "head_dist", None))
    return Macs(total, own, rest + _pooling(getattr(vit, "attn_pool", None), before))


def _block(block: Any, attended: int, transformed: int) -> int:  # noqa: ANN401 - a timm block
    """Tokens that enter the attention and tokens that enter the MLP may differ."""
    products = 2 * attended * attended * int(block.attn.num_heads * block.attn.head_dim)
    return attended * _linears(block.attn) + products + transformed * _linears(block.mlp)


def _pooling(pool: Any, tokens: int) -> int:  # noqa: ANN401 - attention pooling, or None
    """Learned queries attend to all tokens; everything but their keys and values is computed per query."""
    if pool is None:
        return 0
    own = _linears(pool) - _linears(pool.kv)
    return tokens * _linears(pool.kv) + int(pool.latent_len * (own + 2 * tokens * pool.kv.in_features))


def _linears(module: nn.Module | None) -> int:
    if module is None:
        return 0
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))

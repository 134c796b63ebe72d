"""The light decoder of masked autoencoders (arXiv:2111.06377): fill in mask tokens, run a few blocks, predict."""

from typing import TypedDict, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mim.layers.positions import sincos_positions
from mim.patches import gather_tokens, visible_indices

WIDEST, HEAD = 512, 32  # MAE's decoder, and the width of each of its heads


class DecoderShape(TypedDict):
    """Width, blocks and attention heads of a decoder."""

    width: int
    depth: int
    heads: int


def decoder_shape(dim: int, width: int | None, depth: int, heads: int | None) -> DecoderShape:
    """A decoder in proportion to an encoder of width ``dim`` where ``width`` or ``heads`` are left open.

    Two thirds of the encoder's width, in whole heads of 32, and 512 at most: 512 for ViT-B, L and H as in MAE, 256 for
    ViT-S, 128 for ViT-Ti, whose decoder would otherwise have five times the parameters of the encoder.
    """
    width = width or min(WIDEST, max(HEAD, HEAD * round(dim * 2 / 3 / HEAD)))
    heads = heads or next(number for number in range(max(1, width // HEAD), 0, -1) if width % number == 0)
    return {"width": width, "depth": depth, "heads": heads}


class FillMasked(nn.Module):
    """Project what the encoder saw, put mask tokens in the places of hidden patches and add fixed positions.

    Args:
        dim: encoder width ``D``.
        grid: ``(h, w)`` patches per side.
        num_prefix: prefix tokens ``P`` of the encoder.
        width: decoder width ``E``.
    """

    positions: Tensor

    def __init__(self, dim: int, grid: tuple[int, int], num_prefix: int, width: int) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.project = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.register_buffer("positions", sincos_positions(grid, width, num_prefix), persistent=False)

    def forward(self, latent: Tensor, mask: Tensor) -> Tensor:
        """``(B, P + K, D)`` and the mask ``(B, N)`` that left ``K`` patches visible, to ``(B, P + N, E)``."""
        tokens = self.project(latent)  # (B, P + K, E)
        places = visible_indices(
            F.pad(mask, (self.num_prefix, 0)), tokens.shape[1]
        )  # (B, P + K), the prefix is visible
        batch, _, width = tokens.shape
        blank = self.mask_token.to(tokens.dtype).expand(batch, self.positions.shape[1], width)
        return blank.scatter(1, places[..., None].expand(-1, -1, width), tokens) + self.positions


class Trunk(nn.Module):
    """Transformer blocks, norm and a linear prediction for patches.

    Args:
        num_prefix: tokens in front that predict nothing.
        out_dim: values predicted for a patch.
        width: width ``E`` of the tokens.
        depth: number of blocks.
        heads: attention heads.
    """

    def __init__(self, num_prefix: int, out_dim: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a decoder of width {width} cannot have {heads} heads")
        self.num_prefix = num_prefix
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = LayerNorm(width)
        self.predict = nn.Linear(width, out_dim)

    def forward(self, sequence: Tensor, indices: Tensor | None = None) -> Tensor:
        """``(B, P + N, E)`` to ``(B, N, out_dim)``, or only the patches in ``indices (B, M)``: ``(B, M, out_dim)``."""
        if indices is None:
            tokens = self.blocks(sequence)[:, self.num_prefix :]
        else:
            tokens = _block_at(self.blocks[-1], self.blocks[:-1](sequence), indices + self.num_prefix)
        prediction: Tensor = self.predict(self.norm(tokens))
        return prediction


def _block_at(block: nn.Module, tokens: Tensor, indices: Tensor) -> Tensor:
    """What a block of a :class:`Trunk` gives at ``indices (B, M)``, which attend to all ``tokens``: ``(B, M, E)``."""
    block = cast(Block, block)
    attn, width = cast(Attention, block.attn), tokens.shape[2]
    normed = block.norm1(tokens)
    weights, biases = attn.qkv.weight.tensor_split([width]), attn.qkv.bias.tensor_split([width])
    query = F.linear(gather_tokens(normed, indices), weights[0], biases[0])  # (B, M, E)
    keys_values = F.linear(normed, weights[1], biases[1])  # (B, P + N, 2E)
    parts = (query, *keys_values.chunk(2, dim=2))
    query, key, value = (part.view(*part.shape[:2], attn.num_heads, -1).transpose(1, 2) for part in parts)
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    chosen = gather_tokens(tokens, indices) + attn.proj(attended)
    refined: Tensor = chosen + block.mlp(block.norm2(chosen))
    return refined


class Decoder(nn.Module):
    """:class:`FillMasked`, then a :class:`Trunk`.

    Args:
        dim: encoder width ``D``.
        grid: ``(h, w)`` patches per side.
        num_prefix: prefix tokens ``P`` of the encoder.
        out_dim: values predicted for a patch.
        width: decoder width ``E``.
        depth: number of blocks.
        heads: attention heads.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        num_prefix: int,
        out_dim: int,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
    ) -> None:
        super().__init__()
        self.fill = FillMasked(dim, grid, num_prefix, width)
        self.trunk = Trunk(num_prefix, out_dim, width, depth, heads)

    def forward(self, latent: Tensor, mask: Tensor, indices: Tensor | None = None) -> Tensor:
        """``(B, P + K, D)`` and ``(B, N)`` to ``(B, N, out_dim)``, or only the patches in ``indices (B, M)``."""
        prediction: Tensor = self.trunk(self.fill(latent, mask), indices)
        return prediction

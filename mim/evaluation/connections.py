"""Token-level masking (TLM): in fine-tuning, some tokens of every block lose connections, so that none relies on few.

The paper is on text; its two ways of masking are read here as: a token may look at all others but itself, or at nothing
but itself. Which tokens, and in which of the two ways, is drawn anew for each block and image; when scored, all
connections are there.
"""

from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class ConnectionMaskedViT(nn.Module):
    """A plain timm ViT that loses connections in training; its weights and what it answers when scored stay timm's.

    Args:
        vit: with its classifier.
        share: of the tokens of a block that lose connections.

    Raises:
        TypeError: naming what is no plain ViT.
    """

    def __init__(self, vit: nn.Module, share: float) -> None:
        super().__init__()
        if not isinstance(vit, VisionTransformer):
            raise TypeError(f"timm's {type(vit).__name__} is no plain ViT")
        self.vit, self.share = vit, share

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to logits ``(B, classes)``; draws from torch's global generator in training."""
        if not self.training:
            return cast(Tensor, self.vit(images))
        vit: Any = self.vit
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for block in vit.blocks:
            x = block(x, attn_mask=connections(len(x), x.shape[1], self.share, x.device))
        return cast(Tensor, vit.forward_head(vit.norm(x)))


def connections(batch: int, tokens: int, share: float, device: torch.device | str = "cpu") -> Tensor:
    """``(batch, 1, tokens, tokens)`` bool, True where the token of a row looks at that of a column.

    Args:
        batch: images.
        tokens: of each, prefix and patches; at least two.
        share: probability that a token loses connections: in half of the cases that to itself, otherwise all others.
        device: where to draw.
    """
    drawn = torch.rand(batch, 1, tokens, 1, device=device)
    itself = torch.eye(tokens, dtype=torch.bool, device=device)
    blind, alone = drawn < share / 2, (drawn >= share / 2) & (drawn < share)
    return torch.where(itself, ~blind, ~alone)

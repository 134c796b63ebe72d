"""The two families of timm ViTs that this project takes, and what is done to both alike."""

from typing import Any, TypeAlias, cast

import torch
from timm.layers.drop import DropPath
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

ViT: TypeAlias = VisionTransformer | Eva
"""Plain ViTs, and those with rotary positions: EVA-02, DINOv3, PE, rope-ViT."""

BLOCKS = (Block, EvaBlock, EvaBlockPostNorm)
"""What encoders of both families, and all decoders, are made of."""


def compile_blocks(module: nn.Module) -> None:
    """Compiles every transformer block inside: one small graph for each shape, used by all of them."""
    for part in module.modules():
        if isinstance(part, BLOCKS):
            part.compile()


def set_drop_path(vit: ViT, rate: float) -> None:
    """Stochastic depth rising linearly from 0 in the first block to ``rate`` in the last."""
    for block, share in zip(cast(Any, vit.blocks), torch.linspace(0, rate, len(vit.blocks)).tolist(), strict=True):
        block.drop_path1, block.drop_path2 = DropPath(share), DropPath(share)

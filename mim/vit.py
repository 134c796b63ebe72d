"""The two families of timm ViTs that this project takes, and what is done to both alike."""

from typing import TypeAlias

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

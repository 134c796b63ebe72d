"""Transformer blocks of timm, as far as all of them are treated alike."""

from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import nn

BLOCKS = (Block, EvaBlock, EvaBlockPostNorm)
"""What encoders of both families and all decoders are made of."""


def compile_blocks(module: nn.Module) -> None:
    """Compiles every transformer block inside: one small graph for each shape, used by all of them."""
    for part in module.modules():
        if isinstance(part, BLOCKS):
            part.compile()

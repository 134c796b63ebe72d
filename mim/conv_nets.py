"""The families of timm's conv nets that this project takes."""

from typing import TypeAlias

from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet

ConvNet: TypeAlias = ResNet | ConvNeXt
"""Five or four stages, each half as wide in pixels as the one before; ConvNeXt V2 is among them."""

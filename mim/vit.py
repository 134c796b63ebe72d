"""The two families of timm ViTs that this project takes, and what is done to both alike."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.overrides import TorchFunctionMode

ViT: TypeAlias = VisionTransformer | Eva
"""Plain ViTs, and those with rotary positions: EVA-02, DINOv3, PE, rope-ViT."""

BLOCKS = (Block, EvaBlock, EvaBlockPostNorm)
"""What encoders of both families, and all decoders, are made of."""


def compile_blocks(module: nn.Module) -> None:
    """Compiles every transformer block inside: one small graph for each shape, used by all of them."""
    for part in module.modules():
        if isinstance(part, BLOCKS):
            part.compile()


def distilled(vit: nn.Module) -> bool:
    """Whether the model answers by two classifiers, one of them behind a distillation token, as DeiT's (timm)."""
    return isinstance(vit, VisionTransformerDistilled)


@contextmanager
def without_weights() -> Iterator[None]:
    """Models made inside have shapes and no numbers: they take no storage, and a sixth of the time."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Leaves out what fills tensors without storage, one operation in Python for each."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - of any function of torch
        kwargs = kwargs or {}
        if func.__name__ in _FILLING and (filled := args[0] if args else kwargs["tensor"]).is_meta:
            return filled
        return func(*args, **kwargs)


_FILLING = {"normal_", "uniform_", "erfinv_", "clamp_", "mul_", "add_", "zero_", "fill_"}

"""Conv nets that see the visible places of an image only, by dense operations.

Outputs at hidden places are zeroed after every layer, and batch statistics are those of visible places: what sparse
convolutions compute (arXiv:2301.03580). The net itself is timm's; its layers lend their ``forward`` for one call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, GlobalResponseNormMlp, LayerNorm, LayerNorm2d, Mlp
from timm.layers.activations import GELU, GELUTanh
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from mim.distributed.collectives import gather_rows


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the visible places of the images of all processes."""

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """``x (B, C, H, W)``, 0 at hidden places; ``visible (B, 1, H, W)`` of 0 and 1, all places unless given."""
        return visible_batch_norm(self, x, visible)


def visible_batch_norm(norm: nn.BatchNorm2d, x: Tensor, visible: Tensor | None = None) -> Tensor:
    """``norm`` of ``x (B, C, H, W)`` with the statistics of visible places, over all processes; 0 at hidden ones.

    Args:
        norm: whose running statistics are what counts in evaluation; :func:`move_statistics` moves them.
        x: 0 at hidden places.
        visible: ``(B, 1, H, W)`` of 0 and 1; all places are visible unless given.
    """
    if not norm.training:
        out = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        return out if visible is None else out * visible
    count, mean, var = visible_statistics(x.float(), visible)
    norm.__dict__.setdefault("batch_statistics", []).append((count, mean.detach(), var.detach()))
    scale = norm.weight * (var + norm.eps).rsqrt()
    out = (x - _wide(mean)) * _wide(scale) + _wide(norm.bias)
    return (out if visible is None else out * visible).to(x.dtype)


def visible_statistics(x: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Number of visible places ``()``, mean ``(C,)`` and biased variance ``(C,)`` over them, in all processes.

    Args:
        x: ``(B, C, H, W)``, 0 at hidden places.
        visible: ``(B, 1, H, W)`` of 0 and 1; all places are visible unless given.
    """
    places = x.new_full((), x.numel() / x.shape[1]) if visible is None else visible.sum(dtype=x.dtype)
    mean = x.sum(dim=(0, 2, 3)) / places.clamp(min=1)
    apart = x - _wide(mean)
    spread = (apart if visible is None else apart * visible).square().sum(dim=(0, 2, 3))
    rows = gather_rows(torch.cat([places[None], mean, spread])[None])  # (processes, 1 + 2 C)
    counts, means, spreads = rows[:, :1].detach(), rows[:, 1 : 1 + x.shape[1]], rows[:, 1 + x.shape[1] :]
    count = counts.sum().clamp(min=1)
    mean = (counts * means).sum(0) / count
    return count, mean, (spreads + counts * (means - mean).square()).sum(0) / count


def move_statistics(net: nn.Module, unless: Tensor) -> None:
    """Moves running statistics towards those of the batches since the last call, as torch does in the forward pass.

    Args:
        net: layers of :func:`visible_batch_norm` in it.
        unless: scalar bool on their device: whether everything stays as it is.
    """
    for norm in _norms(net):
        for count, mean, var in norm.__dict__.pop("batch_statistics", ()):
            momentum = 0.1 if norm.momentum is None else norm.momentum
            unbiased = var * count / (count - 1).clamp(min=1)
            for running, seen in ((norm.running_mean, mean), (norm.running_var, unbiased)):
                running.copy_(torch.where(unless, running, running.lerp(seen.to(running.dtype), momentum)))
            norm.num_batches_tracked.add_(~unless)


def running_statistics(net: nn.Module) -> Tensor:
    """All of them in one vector."""
    return torch.cat([values for norm in _norms(net) for values in (norm.running_mean, norm.running_var)])


def _norms(net: nn.Module) -> list[Any]:
    return [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]


@contextmanager
def only_visible(net: nn.Module, visible: Tensor) -> Iterator[None]:
    """Inside, ``net`` computes on visible places alone; what it gives is 0 at all others.

    Args:
        net: one that :func:`unknown_layers` finds nothing in.
        visible: ``(B, 1, h, w)`` of 0 and 1 on the coarsest grid.
    """
    lent = [layer for layer in net.modules() if type(layer) in _MASKED]
    for layer in lent:
        layer.forward = partial(_MASKED[type(layer)], layer, visible)
    try:
        yield
    finally:
        for layer in lent:
            layer.__dict__.pop("forward", None)


def enlarged(visible: Tensor, size: tuple[int, int]) -> Tensor:
    """``visible (B, 1, h, w)`` at a multiple of its size: ``(B, 1, H, W)``."""
    height, width = size[0] // visible.shape[2], size[1] // visible.shape[3]
    return visible.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)


def unknown_layers(net: nn.Module) -> list[str]:
    """Names of kinds of layers that are not known to work place by place, or to be masked."""
    return sorted({type(layer).__name__ for layer in net.modules() if type(layer) not in {*_MASKED, *_HARMLESS}})


def _channels_first(layer: nn.Module, visible: Tensor, x: Tensor) -> Tensor:
    out: Tensor = type(layer).forward(layer, x)  # (B, C, H, W)
    return out * enlarged(visible, (out.shape[2], out.shape[3])).to(out.dtype)


def _channels_last(layer: nn.Module, visible: Tensor, x: Tensor) -> Tensor:
    out: Tensor = type(layer).forward(layer, x)  # (B, H, W, C)
    return out * enlarged(visible, (out.shape[1], out.shape[2])).movedim(1, 3).to(out.dtype)


def _any_order(layer: Any, visible: Tensor, x: Tensor) -> Tensor:  # noqa: ANN401 - timm's
    return (_channels_last if layer.channel_dim == -1 else _channels_first)(layer, visible, x)


def _batch_norm(layer: nn.BatchNorm2d, visible: Tensor, x: Tensor) -> Tensor:
    return visible_batch_norm(layer, x, enlarged(visible, (x.shape[2], x.shape[3])).to(x.dtype))


_MASKED: dict[type[nn.Module], Callable[..., Tensor]] = {
    **dict.fromkeys((nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, LayerNorm2d), _channels_first),
    **dict.fromkeys((nn.Linear, LayerNorm, nn.LayerNorm), _channels_last),
    GlobalResponseNorm: _any_order,  # its sum over places counts visible ones only, as the others are 0
    nn.BatchNorm2d: _batch_norm,
}
_HARMLESS: set[type[nn.Module]] = {
    *(ResNet, BasicBlock, Bottleneck, ConvNeXt, ConvNeXtStage, ConvNeXtBlock),
    *(nn.Sequential, nn.Identity, Mlp, GlobalResponseNormMlp, nn.Dropout, DropPath),
    *(nn.ReLU, nn.GELU, GELU, GELUTanh, nn.SiLU),  # which are 0 at 0
}


def _wide(values: Tensor) -> Tensor:
    """``(C,)`` to ``(C, 1, 1)``."""
    return values[:, None, None]

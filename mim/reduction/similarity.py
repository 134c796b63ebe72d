"""Products of features that decide which tokens go together, in full precision whatever the model computes in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32, also under autocast, where rounding would choose among similar tokens."""
    with _full_precision(left.device.type):
        return left.float() @ right.float()


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """``(B, N, D)`` and ``(B, K, D)`` to ``(B, N, K)``, as products: torch's own distance has no ONNX form."""
    squares = points.square().sum(dim=2)[..., None] + centres.square().sum(dim=2)[:, None]
    return (squares - 2 * product(points, centres.transpose(1, 2))).clamp(min=0)


def _full_precision(device: str) -> AbstractContextManager[object]:
    # A context where nothing is to be switched off would end up in exported graphs.
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()

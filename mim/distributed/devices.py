"""Between processor and accelerator."""

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on ``device``; from pinned memory, so that a GPU is not waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)

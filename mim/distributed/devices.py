"""Between processor and accelerator: in which precision, and how tensors get there."""

from typing import Literal

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor on ``device``; from the CPU through pinned memory, so that a GPU is not waited for."""
    if device.type != "cuda" or values.device.type != "cpu":  # what lies on a GPU cannot be pinned
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def best_precision(cuda: bool) -> Literal["bf16-mixed", "32-true"]:
    """bf16-mixed where a GPU computes that has it."""
    return "bf16-mixed" if cuda and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"

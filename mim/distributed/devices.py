"""Between processor and accelerator: in which precision, and how tensors get there."""

import torch
from torch import Tensor


def best_precision(gpu: bool) -> str:
    """``bf16-mixed`` if there is a GPU, it is wanted, and it has bf16; ``32-true`` otherwise."""
    return "bf16-mixed" if gpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"


def send(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on ``device``; from pinned memory, so that a GPU is not waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)

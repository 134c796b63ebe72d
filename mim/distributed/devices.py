"""Between processor and accelerator."""

import torch
from torch import Tensor

from mim.errors import UserError


def chosen_device(device: str) -> torch.device:
    """What ``--device`` names: auto takes a GPU if there is one.

    Raises:
        UserError: if a GPU is asked for and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here", hint="--device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def send(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on ``device``; from pinned memory, so that a GPU is not waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)

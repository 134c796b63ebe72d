"""What patches answer about the pixels of a mask."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_cross_entropy(logits: Tensor, grid: tuple[int, int], labels: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that have a class; 0 if none has.

    Args:
        logits: ``(B, N, classes)``, patch by patch; resized bilinearly.
        grid: ``(h, w)``.
        labels: ``(B, H, W)`` class numbers, -1 where there is none.
    """
    answer = logits.transpose(1, 2).reshape(len(labels), -1, *grid)  # (B, classes, h, w)
    answer = F.interpolate(answer.float(), labels.shape[1:], mode="bilinear")
    known = (labels >= 0).sum().clamp(min=1)
    return F.cross_entropy(answer, labels, ignore_index=-1, reduction="sum") / known


def patch_cross_entropy(logits: Tensor, grid: tuple[int, int], labels: Tensor) -> Tensor:
    """Mean cross-entropy over the patches whose first pixel has a class; 0 if none has.

    Args:
        logits: ``(B, N, classes)``, patch by patch.
        grid: ``(h, w)``.
        labels: ``(B, H, W)`` class numbers, -1 where there is none.
    """
    rows, columns = (
        torch.arange(patches, device=labels.device) * pixels // patches
        for patches, pixels in zip(grid, labels.shape[1:], strict=True)
    )
    first = labels[:, rows[:, None], columns].flatten()  # (B * N,)
    known = (first >= 0).sum().clamp(min=1)
    return F.cross_entropy(logits.flatten(0, 1).float(), first, ignore_index=-1, reduction="sum") / known

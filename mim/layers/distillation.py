"""Cross-entropy between the distributions of a teacher and the logits of a student (DINO, arXiv:2104.14294)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

STUDENT_TEMPERATURE = 0.1
CHUNK = 2048  # patches whose logits are held at once: 64 MiB in fp32 for 8192 prototypes


def class_loss(targets: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy of student views with all other teacher views, mean over images and pairs.

    Args:
        targets: ``(2, B, K)`` distributions of the teacher for the two large views.
        logits: ``(V, B, K)`` of the student, divided by its temperature; views 0 and 1 are those of the teacher.
    """
    pairs = logits.logsumexp(dim=-1) - torch.stack([(target * logits).sum(dim=-1) for target in targets])  # (2, V, B)
    different = ~torch.eye(2, len(logits), dtype=torch.bool, device=logits.device)
    return (pairs.mean(dim=-1) * different).sum() / (2 * len(logits) - 2)


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """``(M, K)`` distributions and ``(M, K)`` logits to ``(M,)``; distributions sum to 1."""
    return logits.logsumexp(dim=-1) - (targets * logits).sum(dim=-1)


def hidden_losses(
    points: Tensor, prototypes: Tensor, taught: Tensor, soften: Callable[[Tensor], Tensor], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum over hidden patches of weight x cross-entropy, and of weight x entropy of the teacher.

    Logits of a chunk are computed again in the backward pass instead of being kept.

    Args:
        points: ``(M, bottleneck)`` of the student.
        prototypes: ``(K, bottleneck)`` of the student.
        taught: ``(M, ...)`` what the teacher says of the same patches.
        soften: from a chunk of ``taught`` to the teacher's distributions ``(chunk, K)``.
        weight: ``(M,)``.
    """

    def losses(points: Tensor, taught: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(points, prototypes).float() / STUDENT_TEMPERATURE  # (chunk, K)
        with torch.no_grad():
            targets = soften(taught)
            entropy = torch.special.entr(targets).sum(dim=-1)
        return torch.stack([(weight * cross_entropy(targets, logits)).sum(), (weight * entropy).sum()])

    chunks = zip(*(torch.split(values, CHUNK) for values in (points, taught, weight)), strict=True)
    sums = [checkpoint(losses, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    total, entropy = torch.stack(sums).sum(dim=0)
    return total, entropy.detach()

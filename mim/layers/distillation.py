"""Cross-entropy between the distributions of a teacher and the logits of a student (DINO, arXiv:2104.14294)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

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

    The gradient of a chunk is computed with its loss, while its logits are there; they are not kept.

    Args:
        points: ``(M, bottleneck)`` of the student.
        prototypes: ``(K, bottleneck)`` of the student.
        taught: ``(M, ...)`` what the teacher says of the same patches.
        soften: from a chunk of ``taught`` to the teacher's distributions ``(chunk, K)``.
        weight: ``(M,)``.
    """
    losses: tuple[Tensor, Tensor] = _HiddenLosses.apply(points, prototypes, taught, soften, weight)
    return losses


class _HiddenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        points: Tensor,
        prototypes: Tensor,
        taught: Tensor,
        soften: Callable[[Tensor], Tensor],
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        sums, of_points, of_prototypes = [], [], torch.zeros_like(prototypes)
        for own, other, share in zip(*(torch.split(values, CHUNK) for values in (points, taught, weight)), strict=True):
            logits = F.linear(own, prototypes).float() / STUDENT_TEMPERATURE  # (chunk, K)
            targets = soften(other)
            entropy = torch.special.entr(targets).sum(dim=-1)
            sums.append(torch.stack([(share * cross_entropy(targets, logits)).sum(), (share * entropy).sum()]))
            gradient = (logits.softmax(dim=-1) - targets) * (share / STUDENT_TEMPERATURE)[:, None]
            gradient = gradient.to(prototypes.dtype)  # of the products of points and prototypes
            of_points.append(F.linear(gradient, prototypes.mT).to(points.dtype))
            of_prototypes += F.linear(gradient.mT, own.mT)
        ctx.save_for_backward(torch.cat(of_points), of_prototypes)
        total, entropy = torch.stack(sums).sum(dim=0)
        ctx.mark_non_differentiable(entropy)
        return total, entropy

    @staticmethod
    def backward(ctx: Any, total: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # noqa: ANN401 - torch types no context
        of_points, of_prototypes = ctx.saved_tensors
        return total * of_points, total * of_prototypes, None, None, None

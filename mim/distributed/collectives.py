"""Sums, maxima and rows over the processes of a run; nothing is done where there is one process alone."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def process_count() -> int:
    """Processes that take part in the training, 1 if none were grouped."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """``values`` themselves, of the same shape in all processes, each now the sum of all."""
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def max_over_processes(values: Tensor) -> Tensor:
    """``values`` themselves, of the same shape in all processes, each now the largest of all."""
    if process_count() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather_rows(values: Tensor) -> Tensor:
    """``(B, ...)`` of each process, as many in all, one after the other: ``(B * processes, ...)``.

    Gradients go back to the process that the rows came from, from all that used them.
    """
    if process_count() == 1:
        return values
    gathered: Tensor = _GatherRows.apply(values)
    return gathered


def own_rows(count: int) -> slice:
    """Where this process's ``count`` rows are in what :func:`gather_rows` gives."""
    first = count * dist.get_rank() if process_count() > 1 else 0
    return slice(first, first + count)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        ctx.rows = own_rows(len(values))
        parts = [torch.empty_like(values) for _ in range(process_count())]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        return sum_over_processes(gradients[0].clone())[ctx.rows]

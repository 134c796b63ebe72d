"""Sums and maxima over the processes of a run, in place; nothing is done where there is one process alone."""

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

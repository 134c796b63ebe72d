"""A teacher: the moving average of a student's weights (mean teacher, arXiv:1703.01780)."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mim.distributed.sharding import local

TOGETHER = 64
"""Tensors that a device averages in one kernel; a copy of so many is held meanwhile."""


class Teacher(nn.Module):
    """Moving average of a module, never trained and always in evaluation mode.

    Its weights are the method's own and part of checkpoints; the student belongs to whoever trains it and is not saved
    twice. :class:`~mim.methods.Method` starts every teacher before training, after ``--init`` has filled the student.

    Args:
        student: what is averaged: one module, or an ``nn.ModuleDict`` of named parts.

    Attributes:
        module: the average, of the same kind as ``student``.
    """

    module: Any  # whatever the student is; nn.Module knows no narrower type of an attribute

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self._student = (student,)  # in a tuple, which nn.Module does not look into
        self.module = copy.deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def start(self) -> None:
        """Copies the student."""
        for own, other in self._pairs():
            own.copy_(other)

    @torch.no_grad()
    def update(self, momentum: float, *, unless: Tensor) -> None:
        """Moves towards the student after a step of the optimizer.

        Args:
            momentum: share of itself that the teacher keeps, 0 to 1.
            unless: scalar bool on the device of the weights; where it is true the teacher stays as it is.
        """
        moved = torch.where(unless, 0.0, 1 - momentum)  # on the device: no synchronisation
        pairs = [pair for pair in self._pairs() if pair[0].is_floating_point()]
        if moved.device.type != "cpu":
            for start in range(0, len(pairs), TOGETHER):
                own, other = zip(*pairs[start : start + TOGETHER], strict=True)
                lerp_together(own, other, moved)
            return
        for own, other in pairs:
            own.lerp_(other, moved)

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode: a teacher has no drop path."""
        return super().train(False)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Every tensor of the teacher and the student's counterpart, this process's share of each."""
        (student,) = self._student
        pairs = zip(self.module.state_dict().values(), student.state_dict().values(), strict=True)
        return [(local(own), local(other)) for own, other in pairs]


def lerp_together(own: Sequence[Tensor], other: Sequence[Tensor], share: Tensor) -> None:
    """Moves every tensor by a ``share`` of the way to its counterpart, in place: three kernels for all of them.

    torch's own over lists takes that share as a number, which only the CPU would have to wait for, or falls back to one
    kernel per tensor.
    """
    way = torch._foreach_sub(other, own)
    torch._foreach_mul_(way, share)
    torch._foreach_add_(own, way)

"""What every training with labels shares: a learning rate by the step, and stochastic depth."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from timm.layers import DropPath
from torch import nn


class SupervisedTraining(L.LightningModule):
    """A training whose learning rate is a function of the step: a group's is ``learning_rate * lr_scale``."""

    def learning_rate(self, step: int) -> float:
        """Of the head, at the step that follows ``step`` finished ones."""
        raise NotImplementedError

    def after_optimizer_step(self) -> None:
        """Called once after each optimizer step; averages of the weights are updated here."""

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,  # noqa: ANN401 - Lightning's signature
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Sets the learning rate from the step, then steps."""
        lr = self.learning_rate(self.global_step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.after_optimizer_step()


def set_drop_path(net: nn.Module, last: float) -> None:
    """Stochastic depth for all branches of each block, from 0 in the first to ``last`` in the last one."""
    layers = [(block, names) for block in net.modules() if (names := [n for n in _DROP_PATHS if hasattr(block, n)])]
    for (block, names), rate in zip(layers, torch.linspace(0, last, len(layers)).tolist(), strict=True):
        for name in names:
            setattr(block, name, DropPath(rate))


_DROP_PATHS = ("drop_path", "drop_path1", "drop_path2")
"""What blocks of ViTs, two branches each, and of conv nets call it."""

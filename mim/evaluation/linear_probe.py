"""Linear classifiers at many learning rates, trained in one pass over the features.

The protocols of MAE (arXiv:2111.06377, appendix A.1: batch norm without affine parameters, LARS) and iBOT
(arXiv:2111.07832: no norm, SGD). All heads see the same batches, so their logits are one matrix product and their
gradients another; the gradient of softmax regression is short enough to be written out.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mim.evaluation.bank import Bank
from mim.evaluation.batches import shuffled, steps_per_epoch
from mim.options.classification import ProbeRecipe
from mim.randomness import keyed_generator
from mim.schedules import warmup_cosine

_MOMENTUM, _TRUST = 0.9, 0.001


class LinearHeads(nn.Module):
    """L linear classifiers behind one normalisation, with equal initial weights (normal, deviation 0.01; bias 0).

    Args:
        features: width F.
        classes: of each head.
        heads: their number L.
        norm: ``batch``, or ``none``.
        seed: of the weights.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, features: int, classes: int, heads: int, norm: str, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features, eps=1e-6, affine=False) if norm == "batch" else nn.Identity()
        weight = 0.01 * torch.randn(features, 1, classes, generator=keyed_generator(seed, "linear head"))
        self.register_buffer("weight", weight.repeat(1, heads, 1))  # (F, L, classes)
        self.register_buffer("bias", torch.zeros(heads, classes))

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(B, L, classes)`` for ``(B, F)``."""
        return self._logits(self.norm(features))

    @torch.inference_mode(False)
    @torch.no_grad()
    def alone(self, head: int) -> nn.Linear:
        """One of the classifiers as a layer that gives the same, with the norm in front of it among its weights."""
        weight, bias = self.weight[:, head], self.bias[head]  # (F, classes)
        if isinstance(self.norm, nn.BatchNorm1d):
            mean, variance = cast(Tensor, self.norm.running_mean), cast(Tensor, self.norm.running_var)
            weight = weight / (variance + self.norm.eps).sqrt()[:, None]
            bias = bias - mean @ weight
        layer = nn.Linear(*weight.shape, device=weight.device)
        layer.weight.copy_(weight.T)
        layer.bias.copy_(bias)
        return layer

    def gradients(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of each head's mean cross-entropy, with respect to its weight and bias."""
        inputs = self.norm(features)
        residual = self._logits(inputs).softmax(2)  # (B, L, classes)
        residual.scatter_add_(2, labels[:, None, None].expand(-1, residual.shape[1], 1), -torch.ones_like(residual))
        residual /= len(labels)
        return (inputs.T @ residual.flatten(1)).view_as(self.weight), residual.sum(0)

    def _logits(self, inputs: Tensor) -> Tensor:
        return (inputs @ self.weight.flatten(1)).view(len(inputs), *self.bias.shape) + self.bias


@torch.no_grad()
def fit_linear(
    banks: Sequence[Bank],
    rows: Tensor,
    recipe: ProbeRecipe,
    classes: int,
    seed: int,
    device: torch.device | str = "cpu",
    after_epoch: Callable[[LinearHeads], None] | None = None,
) -> LinearHeads:
    """Trains a head per learning rate.

    Args:
        banks: features, one bank per random crop.
        rows: ``(R,)`` images to learn from.
        recipe: learning rates, schedule, optimizer and norm.
        classes: number of classes.
        seed: of weights and order.
        device: where to train.
        after_epoch: is shown the heads, in evaluation mode, after every epoch.

    Returns:
        The heads in the order of ``recipe.rates``, in evaluation mode.
    """
    rates = torch.tensor(recipe.rates, device=device) * recipe.batch_size / 256
    heads = LinearHeads(banks[0].features.shape[1], classes, len(rates), recipe.norm, seed).to(device)
    velocity = [torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)]
    per_epoch = steps_per_epoch(len(rows), recipe.batch_size)
    warmup, total, step = recipe.warmup_epochs * per_epoch, recipe.epochs * per_epoch, 0
    for epoch in range(recipe.epochs):
        heads.train()
        for features, labels in shuffled(banks, rows, recipe.batch_size, epoch, seed, device):
            weight, bias = heads.gradients(features, labels)
            if recipe.optimizer == "lars":
                weight *= _trust(heads.weight, weight)
            lr = (rates * warmup_cosine(step, warmup, total, 1.0, 0.0))[:, None]  # (L, 1)
            for value, gradient, memory in zip((heads.weight, heads.bias), (weight, bias), velocity, strict=True):
                memory.mul_(_MOMENTUM).add_(gradient)
                value.sub_(lr * memory)
            step += 1
        heads.eval()
        if after_epoch is not None:
            after_epoch(heads)
    return heads


def _trust(weight: Tensor, gradient: Tensor) -> Tensor:
    """LARS' factor per head, ``(L, 1)``: the step is a thousandth of the weight's length (arXiv:1708.03888)."""
    lengths = [values.norm(dim=(0, 2)) for values in (weight, gradient)]
    ratio = _TRUST * lengths[0] / lengths[1]
    return torch.where((lengths[0] > 0) & (lengths[1] > 0), ratio, 1.0)[:, None]

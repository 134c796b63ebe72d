"""Several targets at once, such as edges to learn from and pixels to look at."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mim.encoder import Encoder
from mim.targets.base import Target


class JointTarget(Target):
    """The values of several targets behind each other; the error is the weighted sum of their errors.

    Args:
        targets: what is predicted.
        weights: of each error; 1 unless given.
    """

    def __init__(self, targets: list[Target], weights: list[float] | None = None) -> None:
        super().__init__()
        if len(targets) < 2:
            raise ValueError("targets: two or more; a single one needs no JointTarget")
        if weights is not None and (len(weights) != len(targets) or not all(0 < weight < 1e6 for weight in weights)):
            raise ValueError(f"weights {weights}: one above 0 for each of the {len(targets)} targets")
        self.targets = nn.ModuleList(targets)
        self.shares = list(weights or [1.0] * len(targets))
        self.sizes: list[int] = []

    def dim(self, encoder: Encoder) -> int:
        """The sum of theirs; settles which values are whose."""
        self.sizes = [target.dim(encoder) for target in self._each()]
        return sum(self.sizes)

    def forward(self, images: Tensor, grid: tuple[int, int], indices: Tensor, weights: Tensor | None = None) -> Tensor:
        """``(B, M, dim)``; see :meth:`Target.forward`."""
        own = self._parts(weights)
        called = [(images, grid, indices) if part is None else (images, grid, indices, part) for part in own]
        return torch.cat([target(*given) for target, given in zip(self._each(), called, strict=True)], dim=-1)

    def weights(self, valid: Tensor | None, images: Tensor, grid: tuple[int, int], indices: Tensor) -> Tensor | None:
        """``(B, M, dim)``, those of each target; see :meth:`Target.weights`."""
        parts = []
        for target, size in zip(self._each(), self.sizes, strict=True):
            part = target.weights(valid, images, grid, indices)
            if part is None:
                return None
            # One that does not tell its values apart says of each patch whether it counts.
            parts.append(part if part.shape[-1] == size else part.amax(-1, keepdim=True).expand(*part.shape[:2], size))
        return torch.cat(parts, dim=-1)

    def error(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Weighted sum of the targets' errors, ``(B, M)``."""
        return self._sum(lambda own, *parts: own.errors(*parts), prediction, target, weights)

    def loss(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Weighted sum of the targets' losses, a scalar: each over the patches that count for it."""
        return self._sum(lambda own, *parts: own.loss(*parts), prediction, target, weights)

    def check(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """See :meth:`Target.check`."""
        for target in self._each():
            target.check(mean, std)

    def pictures(self, prediction: Tensor, images: Tensor, grid: tuple[int, int], indices: Tensor) -> dict[str, Tensor]:
        """Those of all targets; see :meth:`Target.pictures`."""
        shown: dict[str, Tensor] = {}
        for target, part in zip(self._each(), torch.split(prediction, self.sizes, dim=-1), strict=True):
            shown |= target.pictures(part, images, grid, indices)
        return shown

    def _each(self) -> list[Target]:
        return [target for target in self.targets if isinstance(target, Target)]

    def _parts(self, values: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(self.sizes) if values is None else torch.split(values, self.sizes, dim=-1)

    def _sum(self, measure: Callable[..., Any], *values: Tensor | None) -> Tensor:
        parts = zip(self._each(), *map(self._parts, values), strict=True)
        errors = [share * measure(*part) for share, part in zip(self.shares, parts, strict=True)]
        total: Tensor = torch.stack(errors).sum(dim=0)
        return total

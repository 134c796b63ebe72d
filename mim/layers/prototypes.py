"""Heads that compare tokens with prototypes, as in DINO (arXiv:2104.14294) and iBOT (arXiv:2111.07832)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """Tokens to points on a sphere, and the prototypes that they are compared with.

    Args:
        dim: width of a token.
        prototypes: how many, ``K``.
        hidden: width of the two hidden layers.
        bottleneck: width of the points.
        shared: what class token and patches have in common: MLP and prototypes if true, the MLP if false, or nothing.
        unit_prototypes: whether the lengths of prototypes stay 1.
    """

    def __init__(
        self,
        dim: int,
        prototypes: int,
        hidden: int,
        bottleneck: int,
        shared: bool | Literal["nothing"] = True,
        unit_prototypes: bool = False,
    ) -> None:
        super().__init__()
        self.mlp = _mlp(dim, hidden, bottleneck)
        self.patch_mlp = _mlp(dim, hidden, bottleneck) if shared == "nothing" else None
        self.prototypes = nn.ModuleList(
            Prototypes(prototypes, bottleneck, unit_prototypes) for _ in range(1 if shared is True else 2)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Class tokens ``(..., D)`` to ``(..., bottleneck)`` of length 1; logits are their products with prototypes."""
        return _on_sphere(self.mlp(tokens))

    def of_patches(self, tokens: Tensor) -> Tensor:
        """Tokens of patches ``(..., D)`` to ``(..., bottleneck)`` of length 1."""
        return _on_sphere((self.patch_mlp or self.mlp)(tokens))

    def of_both(self, classes: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """``(A, D)`` class tokens and ``(M, D)`` patches, together where the MLP is the same."""
        if self.patch_mlp is not None:
            return self(classes), self.of_patches(patches)
        points = self(torch.cat([classes, patches]))
        return points[: len(classes)], points[len(classes) :]

    def for_classes(self) -> Tensor:
        """Prototypes of the class token, ``(K, bottleneck)``."""
        prototypes: Tensor = self.prototypes[0]()
        return prototypes

    def for_patches(self) -> Tensor:
        """Prototypes of patches, ``(K, bottleneck)``."""
        prototypes: Tensor = self.prototypes[-1]()
        return prototypes


class Prototypes(nn.Module):
    """Rows with a direction and a length, learned apart.

    Args:
        count: how many, ``K``.
        bottleneck: their width.
        unit: whether their lengths stay 1.
    """

    def __init__(self, count: int, bottleneck: int, unit: bool) -> None:
        super().__init__()
        bound = bottleneck**-0.5
        self.direction = nn.Parameter(torch.empty(count, bottleneck).uniform_(-bound, bound))
        self.length = nn.Parameter(torch.ones(count, 1), requires_grad=not unit)

    def forward(self) -> Tensor:
        """``(K, bottleneck)``."""
        return self.length * F.normalize(self.direction, dim=1)


def _on_sphere(points: Tensor) -> Tensor:
    """``(..., bottleneck)`` of length 1 in float32: bf16 would round the length, and with it every logit, by 0.4 %."""
    return F.normalize(points.float(), dim=-1)


def _mlp(dim: int, hidden: int, bottleneck: int) -> nn.Sequential:
    mlp = nn.Sequential(
        nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
    )
    for layer in mlp[::2]:
        nn.init.trunc_normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return mlp

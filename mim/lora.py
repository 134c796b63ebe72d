"""LoRA (arXiv:2106.09685): weights stand still; the product of two thin matrices is added to them and learned."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Linear)


class LoRALinear(nn.Linear):
    """A linear layer whose weight is that of another one plus ``up (out, rank) @ down (rank, in)``, 0 at first.

    The sum is the layer's ``weight``: whoever reads that instead of calling the layer, as timm's attention does where
    queries and values have biases of their own, gets the addition, too.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make another weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.original, self.bias = layer.weight, layer.bias
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, self.in_features), a=5**0.5))
        self.up = nn.Parameter(torch.zeros(self.out_features, rank))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a sum, where nn.Linear has a parameter
        """``(out, in)``."""
        return self.original + self.up @ self.down

    def alone(self, merge: bool) -> nn.Linear:
        """A plain layer with the same parameters, which now hold the sum if ``merge``."""
        if merge:
            with torch.no_grad():
                self.original.copy_(self.weight)
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = self.original, self.bias
        return layer


def adapt(vit: nn.Module, rank: int) -> None:
    """Lets nothing of a ViT learn but an addition of ``rank`` to every linear layer of its attention."""
    vit.requires_grad_(False)
    for name, layer in _layers(vit, nn.Linear).items():
        vit.set_submodule(name, LoRALinear(layer, rank))


def merge(vit: nn.Module) -> None:
    """Puts every addition into its weight: timm's own model again, which gives the same."""
    for name, layer in _layers(vit, LoRALinear).items():
        vit.set_submodule(name, layer.alone(merge=True))


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for a state dict: its names are timm's then."""
    layers = [name.removesuffix("up") for name in tensors if re.search(r"\.attn\.\w+\.up$", name)]
    parts = {layer + part for layer in layers for part in ("original", "up", "down")}
    sums = {f"{s}weight": tensors[f"{s}original"] + tensors[f"{s}up"] @ tensors[f"{s}down"] for s in layers}
    return {name: value for name, value in tensors.items() if name not in parts} | sums


@contextmanager
def set_aside(vit: nn.Module) -> Iterator[None]:
    """Inside, the weights stand alone and have timm's names: to be filled. The same additions come back after it."""
    layers = _layers(vit, LoRALinear)
    for name, layer in layers.items():
        vit.set_submodule(name, layer.alone(merge=False))
    try:
        yield
    finally:
        for name, layer in layers.items():
            vit.set_submodule(name, layer)


def _layers(vit: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    inside = re.compile(r"blocks\.\d+\.attn\.")
    return {name: part for name, part in vit.named_modules() if inside.match(name) and isinstance(part, kind)}

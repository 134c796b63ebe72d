"""Where a conv net lies among the tensors of a checkpoint."""

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

_RUN = "encoder.vit."


def conv_net_in(tensors: Mapping[str, Tensor], names: Iterable[str]) -> tuple[str, dict[str, Tensor]]:
    """Name of the layout, and the tensors of the conv net under timm's names.

    Args:
        tensors: of a checkpoint of a run, of timm, or of a program that puts a prefix before timm's names.
        names: of the model that will take them.
    """
    wanted = sorted(names, key=len)[-8:]  # long names stand for one thing only
    prefixes = Counter(found[: -len(name)] for name in wanted for found in tensors if f".{found}".endswith(f".{name}"))
    prefix = max(prefixes, key=lambda one: (prefixes[one], -len(one)), default="")
    layout = "mim run" if prefix == _RUN else f"timm, {prefix}*" if prefix else "timm"
    return layout, {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

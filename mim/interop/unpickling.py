"""Pickled checkpoints, read without running what is in them: tensors come out, known objects as inert stand-ins."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

_INERT_PACKAGES = frozenset(
    ("argparse", "collections", "dataclasses", "easydict", "enum", "numpy", "omegaconf", "pathlib", "types", "typing")
) | {
    *(
        "deepspeed",
        "dinov2",
        "hydra",
        "lightly",
        "lightly_train",
        "lightning",
        "lightning_fabric",
        "lightning_utilities",
    ),
    *("mmcv", "mmengine", "pytorch_lightning", "timm", "torch", "torchvision", "transformers", "yacs"),
}
"""Packages whose classes are found in checkpoints beside the weights: settings, loggers, whole modules."""
_INERT = frozenset(
    (
        "_codecs.encode",
        "builtins.dict",
        "builtins.int",
        "builtins.list",
        "builtins.set",
        "collections.defaultdict",
        "datetime.datetime",
        "datetime.timedelta",
        "functools.partial",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "torch._C._nn.gelu",
        "torch.nn.functional.gelu",
        "torch.nn.functional.silu",
    )
)
"""The like that are no classes, or not named like one."""
_DEPTH = 64  # modules inside each other


class _Ignored:
    """In place of an array: takes any arguments and any state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Ignored":  # noqa: ANN401
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Does nothing with them."""

    def __setstate__(self, state: Any) -> None:  # noqa: ANN401
        """Does nothing with it."""


class _Attributes:
    """In place of any other object: a mapping with its items, if it is one, and with its attributes in ``__dict__``.

    It is an ``OrderedDict``, since torch's unpickler fills nothing else.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "OrderedDict[str, Any]":  # type: ignore[misc]  # noqa: ANN401
        return OrderedDict()


def unpickled(path: Path, *, trust: bool) -> object:
    """What ``torch.save`` wrote, on the CPU; modules as mappings from the names of their tensors.

    Args:
        path: the file.
        trust: unpickle any object, which can run code.

    Raises:
        Exception: almost any, if the file is damaged, hostile or holds objects of unknown classes.
    """
    if trust:
        return _without_modules(_load(path, trust=True))
    kinds = {name: _Ignored if name.startswith("numpy.") else _Attributes for name in _harmless(path)}
    try:
        with safe_globals([(type("StandIn", (kind,), {}), name) for name, kind in kinds.items()]):
            return _without_modules(_load(path))
    except Exception:
        if not kinds:
            raise
    return _load(path)  # which names what it does not know


def _load(path: Path, trust: bool = False) -> Any:  # noqa: ANN401 - whatever is in the file
    with path.open("rb") as file:  # of a path torch looks at the ending, too
        return torch.load(file, map_location="cpu", weights_only=not trust)


def _without_modules(value: Any, depth: int = 4) -> Any:  # noqa: ANN401 - whatever is in the file
    """Modules, and what stands in for them, as their tensors by name; all other things as they are."""
    if isinstance(value, nn.Module):
        return value.state_dict()
    if not isinstance(value, dict) or not depth:
        return value
    if "_modules" in _attributes(value):
        return _tensors(value, set(), _DEPTH)
    return {name: _without_modules(part, depth - 1) for name, part in value.items()}


def _tensors(module: Any, seen: set[int], depth: int) -> dict[str, Tensor]:  # noqa: ANN401
    """What ``state_dict`` would name; a part that occurs twice, or within itself, only once."""
    if id(module) in seen or not depth:
        return {}
    seen.add(id(module))
    own = _attributes(module)
    found = {
        str(name): part
        for kind in ("_parameters", "_buffers")
        for name, part in _mapping(own, kind).items()
        if isinstance(part, Tensor)
    }
    for name, part in _mapping(own, "_modules").items():
        found |= {f"{name}.{inner}": tensor for inner, tensor in _tensors(part, seen, depth - 1).items()}
    return found


def _attributes(value: Any) -> dict[str, Any]:  # noqa: ANN401
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else {}


def _mapping(attributes: dict[str, Any], name: str) -> dict[str, Any]:
    found = attributes.get(name)
    return found if isinstance(found, dict) else {}


def _harmless(path: Path) -> list[str]:
    """Names in the file that stand-ins are made for; none unless that leaves nothing unknown."""
    try:
        foreign = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the old format, or damaged; torch.load will tell
        return []
    return foreign if all(map(_is_harmless, foreign)) else []


def _is_harmless(name: str) -> bool:
    """Whether a name is that of a class of a known package, or of a function that checkpoints are known to hold."""
    return name in _INERT or (
        name.partition(".")[0] in _INERT_PACKAGES and name.rpartition(".")[2].lstrip("_")[:1].isupper()
    )

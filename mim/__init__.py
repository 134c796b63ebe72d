"""Masked image modeling for timm Vision Transformers.

``mim.pretrain``, ``mim.load``, ``mim.features`` and the evaluations are what ``mim.api`` has; torch is imported with
the first of them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mim.api import (
        Features,
        Loaded,
        Run,
        features,
        finetune,
        knn,
        linear_probe,
        load,
        load_memory,
        pretrain,
        segment,
    )
    from mim.errors import UserError

__version__ = "0.1.0"

__all__ = [
    "Features",
    "Loaded",
    "Run",
    "UserError",
    "features",
    "finetune",
    "knn",
    "linear_probe",
    "load",
    "load_memory",
    "pretrain",
    "segment",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'mim' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("mim.errors" if name == "UserError" else "mim.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

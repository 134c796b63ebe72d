"""Names of timm's models, read off its source: importing timm takes seconds, and telling a misspelt name should not."""

import difflib
import importlib.util
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import version
from pathlib import Path

from mim.errors import UserError
from mim.options.class_paths import plugins_in_use

_ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")
"""How names begin that are none of timm's own."""

_REGISTERED = re.compile(r"^@register_model\s*\ndef (\w+)\(", re.MULTILINE)
_KEY = re.compile(r"""^\s+['"]([\w.]+)['"]\s*:""", re.MULTILINE)  # of published weights and of names that are past
_VITS = {"vision_transformer": "vit_*", "eva": "*", "deit": "deit*"}
"""Modules of timm, and which of their models a method here takes."""
_CONV_NETS = ("resnet", "convnext")


def model_names(pattern: str, module: str) -> list[str]:
    """What ``timm.list_models(pattern, module=module)`` returns."""
    return sorted((name for name in _registered()[module] if fnmatch(name, pattern)), key=_natural)


def check_model(name: str, option: str = "--model") -> None:
    """Refuses what cannot be a model of timm's; one that only a registry could tell passes.

    Raises:
        UserError: that names those that are spelt alike.
    """
    if not _may_be_known(name):
        raise no_such_model(name, option)


def check_weights(weights: str, option: str = "--weights") -> None:
    """Refuses what is neither on this disk, nor a name of timm's.

    Raises:
        UserError: that names those that are spelt alike.
    """
    if not Path(weights.removeprefix("local-dir:")).exists() and not _may_be_known(weights):
        published = sorted(key for key in _keys() if "." in key and not key.endswith(".untrained"))
        raise no_such_weights(weights, option, published)


def no_such_model(name: str, option: str = "--model") -> UserError:
    """What is told of a name that timm does not know."""
    known = {model for module, pattern in _VITS.items() for model in model_names(pattern, module)}
    known |= {model for module in _CONV_NETS if name.startswith(module) for model in model_names(f"{module}*", module)}
    known |= {key for key in _keys() if key.partition(".")[0] in known}
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return UserError(
        f"{option} {name}: timm {version('timm')} has no such model",
        hint="   or   ".join(f"{option} {other}" for other in near or ["vit_small_patch16_224"]),
    )


def no_such_weights(name: str, option: str, published: Iterable[str]) -> UserError:
    """What is told of a name that is neither on this disk nor among the ``published`` ones."""
    close = difflib.get_close_matches(name, [other for other in published if other.startswith("vit_")], n=2)
    return UserError(
        f"{option} {name}: no such file, folder or timm weights",
        hint="   or   ".join(f"{option} {other}" for other in close) or f"{option} FILE, {option} RUN or a timm name",
    )


def _may_be_known(name: str) -> bool:
    """Whether timm, or a package of the user's that may have added models to it, could know a name."""
    architecture = name.partition(".")[0]
    known = architecture in _all() or architecture in {key.partition(".")[0] for key in _keys()}
    return known or name.startswith(_ELSEWHERE) or bool(plugins_in_use())


@cache
def _sources() -> dict[str, str]:
    """The text of each module of timm's models."""
    found = importlib.util.find_spec("timm")
    (home,) = found.submodule_search_locations if found and found.submodule_search_locations else [""]
    return {file.stem: file.read_text(encoding="utf-8") for file in Path(home, "models").glob("*.py")}


@cache
def _registered() -> dict[str, list[str]]:
    """Names of models by the module that registers them."""
    return {module: _REGISTERED.findall(text) for module, text in _sources().items()}


def _all() -> set[str]:
    return {name for names in _registered().values() for name in names}


@cache
def _keys() -> set[str]:
    """What modules list in tables, such as names with tags of published weights."""
    return {key for text in _sources().values() for key in _KEY.findall(text)}


def _natural(name: str) -> list[int | str]:
    """Sorting key that puts 8 before 16."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]

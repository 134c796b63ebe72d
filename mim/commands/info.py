"""Lists what there is: methods, models, configs, and what a run holds."""

import ast
from pathlib import Path
from typing import Literal

from mim.cli import CONFIGS
from mim.errors import UserError

METHODS = Path(__file__).parents[1] / "methods"


def run(what: Literal["methods", "models", "configs", "run"], name: str | None = None) -> None:
    """List what there is.

    Args:
        what: ``methods``, ``models`` (any timm ViT), ``configs`` or ``run``.
        name: pattern of models such as ``vit_small*``, or a run folder.
    """
    {"methods": _methods, "models": _models, "configs": _configs, "run": _run}[what](name)


def _methods(name: str | None) -> None:
    for config in sorted(CONFIGS.glob("*/default.yaml")):
        source = METHODS / f"{config.parent.name}.py"
        docstring = ast.get_docstring(ast.parse(source.read_text())) if source.exists() else None
        print(f"{config.parent.name:<10}{(docstring or '').splitlines()[0] if docstring else ''}")


def _models(name: str | None) -> None:
    import timm

    print("\n".join(timm.list_models(name or "vit_*", module="vision_transformer")))


def _configs(name: str | None) -> None:
    for config in sorted(CONFIGS.glob("*/*.yaml")):
        first = config.read_text().splitlines()[0].lstrip("# ")
        print(f"{config.relative_to(CONFIGS.parent)!s:<44}{first}")


def _run(name: str | None) -> None:
    summary = Path(name or "", "summary.json")
    if name is None or not summary.is_file():
        raise UserError(f"{name}: no run there", hint="python tools/info.py run runs/001-mae-builtin")
    from mim.run.folder import RunFolder

    for key, value in RunFolder(summary.parent).read_summary().items():
        print(f"{key:<20}{value}")

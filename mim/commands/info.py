"""Lists what there is: methods, models, configs, and what a run holds."""

import ast
import re
from pathlib import Path
from typing import Literal

from mim.errors import UserError
from mim.options.recipes import CONFIGS, method_names, recipe_names
from mim.options.timm_names import model_names
from mim.program import called
from mim.run.folder import RunFolder, named_run

METHODS = Path(__file__).parents[1] / "methods"
MASKING = Path(__file__).parents[1] / "masking"


def run(what: Literal["methods", "models", "configs", "run"], name: str | None = None) -> None:
    """List what there is.

    Args:
        what: ``methods``, ``models`` (any timm ViT), ``configs`` or ``run``.
        name: pattern of models such as ``vit_small*``, or a run folder.
    """
    {"methods": _methods, "models": _models, "configs": _configs, "run": _run}[what](name)


def _methods(name: str | None) -> None:
    _print_table({method: _described(method) for method in method_names()})


def _described(method: str) -> str:
    """The first line about a method: of its own file, or else of its masking policy's, which is what makes it."""
    source = METHODS / f"{method}.py"
    if not source.is_file():
        named = re.search(r"class_path: (\w+Masking)", (CONFIGS / method / "default.yaml").read_text())
        files = [file for file in MASKING.glob("*.py") if named and f"class {named[1]}(" in file.read_text()]
        source = files[0] if files else CONFIGS / method / "default.yaml"
    if source.suffix == ".yaml":
        return _first_line(source)
    return (ast.get_docstring(ast.parse(source.read_text())) or "").partition("\n")[0]


def _first_line(config: Path) -> str:
    return config.read_text().partition("\n")[0].lstrip("# ")


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0) + 2
    for name, text in rows.items():
        print(f"{name:<{width}}{text}")


def _models(name: str | None) -> None:
    families = {"vision_transformer": "vit_*", "eva": "*"}  # plain and rotary
    print(
        "\n".join(model for module, all_of_it in families.items() for model in model_names(name or all_of_it, module))
    )


def _configs(name: str | None) -> None:
    _print_table({name: _first_line(CONFIGS / f"{name}.yaml") for name in recipe_names()})


def _run(name: str | None) -> None:
    summary = Path(name or "", "summary.json")
    if name is None or not summary.is_file():
        error = "info run wants a folder" if name is None else f"{name}: no run there"
        raise UserError(error, hint=named_run(f"{called('info')} run"))
    for key, value in RunFolder(summary.parent).read_summary().items():
        print(f"{key:<20}{value}")

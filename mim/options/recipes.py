"""The recipes that come with the package: ``mae/vit_base_patch16_224`` names one of them, as a path names any file."""

import difflib
from pathlib import Path

from mim.errors import UserError
from mim.program import called

_PACKAGE = Path(__file__).parents[1]
CONFIGS = next(home for home in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if home.is_dir())
"""Where they lie: inside an installed package, and beside it in a checkout."""


def recipe_names() -> list[str]:
    """The names of all recipes, as ``--config`` takes them."""
    return sorted(str(file.relative_to(CONFIGS).with_suffix("")) for file in CONFIGS.glob("*/*.yaml"))


def method_names() -> list[str]:
    """What ``--method`` may be: the folders of recipes that have a default."""
    return sorted(file.parent.name for file in CONFIGS.glob("*/default.yaml"))


def recipe_file(name: str | Path, option: str = "--config") -> Path:
    """The file that ``name`` stands for: a path, or a recipe by its name with or without ``.yaml``.

    Raises:
        UserError: if there is neither; ``option`` is what named it.
    """
    if (file := Path(name)).is_file():
        return file
    known = recipe_names()
    wanted = str(name).removesuffix(".yaml")
    if wanted in known:
        return CONFIGS / f"{wanted}.yaml"
    near = difflib.get_close_matches(wanted.removeprefix("configs/"), known, 1)
    hint = f"{option} {near[0]}" if near else f"{called('info')} configs"
    raise UserError(f"{option} {name}: there is no such file, nor a recipe of that name", hint=hint)

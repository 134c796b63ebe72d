"""Prints every dependency at the lowest version that ``pyproject.toml`` allows, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"].values()
for requirement in [*project["dependencies"], *(line for extra in extras for line in extra)]:
    if lowest := re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement):
        print(f"{lowest[1]}=={lowest[2]}")

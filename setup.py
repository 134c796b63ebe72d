"""Puts the recipes of ``configs/`` into the package that is built; all else stands in ``pyproject.toml``."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithRecipes(build_py):
    """Copies ``configs/`` to ``mim/configs``; an editable installation reads the one that lies beside ``mim/``."""

    def run(self) -> None:
        """Builds as ever, then copies."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "mim", "configs")
            shutil.rmtree(target, ignore_errors=True)  # what an earlier build has left
            shutil.copytree("configs", target)


setup(cmdclass={"build_py": WithRecipes})

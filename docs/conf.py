"""The documentation as a site: ``make docs`` writes it to ``build/docs``."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from pages import write_pages  # noqa: E402 - it lies beside this file

from mim import __version__  # noqa: E402

project, author, version, release = "mim", "the mim authors", __version__, __version__
project_copyright = "Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["*.ipynb"]
html_theme = "furo"
html_title = f"mim {__version__}"
html_show_sphinx = False
myst_heading_anchors = 3
autodoc_typehints = "description"
nitpicky = False


def setup(app: Sphinx) -> None:
    """Writes the pages that come from the code before anything is read."""
    app.connect("builder-inited", lambda app: write_pages(HERE / "generated"))
    app.connect("source-read", lead_outside)


def lead_outside(app: Sphinx, name: str, source: list[str]) -> None:
    """Links to what is no page: recipes lead to the page that lists them, files of the root to their copies here."""
    source[0] = re.sub(r"\]\((?:\.\./)+configs/[\w/.-]*\)", "](/generated/recipes.md)", source[0])

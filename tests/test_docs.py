"""The documentation: every link in it leads somewhere, and it builds into a site without a warning."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "log").glob("*.md")])
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page):
    links = {link for link in LINK.findall(page.read_text()) if "generated/" not in link}
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_no_page_holds_both_sides_of_a_merge():
    assert [page.name for page in PAGES if re.search(r"^(<<<<<<< |>>>>>>> )", page.read_text(), re.MULTILINE)] == []


@pytest.mark.middle
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="pip install 'mim-suite[docs]'")
    from sphinx.cmd.build import main

    assert main(["-q", "-W", "--keep-going", str(ROOT / "docs"), str(tmp_path)]) == 0
    assert "--value_range" in (tmp_path / "generated" / "options.html").read_text()
    assert "mae/vit_base_patch16_224" in (tmp_path / "generated" / "recipes.html").read_text()
    assert "it is a list of one or more" in (tmp_path / "generated" / "trouble.html").read_text()
    assert "mim.pretrain" in (tmp_path / "generated" / "functions.html").read_text()

"""The lock holds everything that ``pyproject.toml`` asks for, in a version that it allows, with hashes."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ASKED = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
LOCKED = {
    canonicalize_name(name): (version, hashes)
    for name, version, hashes in re.findall(
        r"^([\w.-]+)==([^ ;\\]+).*?((?:\\\n +--hash=\S+ *)*)$", (ROOT / ".ci" / "lock.txt").read_text(), re.MULTILINE
    )
}


@pytest.mark.parametrize("line", [line for line in ASKED if not line.startswith(PROJECT["name"])])
def test_what_is_asked_for_is_locked_in_a_version_that_is_allowed(line):
    asked = Requirement(line)
    version, _ = LOCKED[canonicalize_name(asked.name)]
    assert version in asked.specifier


def test_every_locked_file_has_its_hash():
    assert len(LOCKED) > 80
    assert [name for name, (_, hashes) in LOCKED.items() if "--hash=sha256:" not in hashes] == []

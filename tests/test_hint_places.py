"""Places of the code that make a hint: tests type what it says, nothing of it can be typed, or they are counted."""

import json
import subprocess
import sys

import pytest
import yaml
from hint_places import LEDGER, ROOT, places
from run_situations import TYPED
from situations import PLAIN
from situations_data import DATA, FORCED, LATE

AT_MOST = {"prose": 96, "open": 0}
"""Places whose hint holds nothing to type, and those whose hint no test types yet: fewer are better."""
CASES = {
    "test_a_refused_option_is_not_refused_again": PLAIN,
    "test_a_refused_data_set_is_not_refused_again": DATA,
    "test_what_is_refused_at_work_is_not_refused_again": LATE,
    "test_what_a_machine_refuses_is_not_refused_again": FORCED,
    "test_what_is_refused_before_the_work_is_not_refused_again": TYPED,
}
"""What these tests are parametrised with."""


@pytest.fixture(scope="module")
def ledger():
    return yaml.safe_load(LEDGER.read_text())


def test_a_new_place_with_a_hint_has_a_test_that_types_it(ledger):
    """Failing? Make the mistake in ``trust/situations.py``, type its hint, and name both in ``hint_places.yaml``."""
    named = {**ledger["typed"], **ledger["prose"]}
    assert named.keys() <= places().keys()
    assert len(ledger["prose"]) <= AT_MOST["prose"]
    assert len(places().keys() - named.keys()) <= AT_MOST["open"]


def test_tests_that_type_hints_exist(ledger):
    for test in set(ledger["typed"].values()):
        file, _, name = test.partition("::")
        function, _, case = name.removesuffix("]").partition("[")
        assert f"def {function}(" in (ROOT / file).read_text(), test
        assert case in CASES.get(function, [case]), test


@pytest.mark.slow
def test_what_hints_propose_does_not_make_the_same_mistake(ledger, tmp_path):
    tests, found = sorted(set(ledger["typed"].values())), tmp_path / "typed.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-q", "-o", "addopts=", "--typed", str(found), *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    assert ledger["typed"].keys() <= {row["place"] for row in rows if "typed" in row}

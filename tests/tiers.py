"""What of a family of equal tests is fast; the others are of the middle tier, and so is whatever joins the family."""

from collections.abc import Container, Iterable

import pytest


def fast(values: Iterable[object], chosen: Container[object]) -> list[object]:
    """Parameters for a test: those chosen as they are, all others marked ``middle``."""
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.middle) for value in values]

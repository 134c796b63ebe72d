"""Numbers with a range: plain ones to Python and on disk, refused by the parser when they do not belong to it."""

import math

import pytest
from jsonargparse import ArgumentError

from mim.cli import function_parser
from mim.errors import UserError
from mim.options.ranges import Count, Positive, ShareBelowOne, check_rising


def sized(side: Count = 3, rate: Positive | None = None, share: ShareBelowOne = 0.5, sides: tuple[Count, ...] = ()):
    """Takes numbers.

    Args:
        side: a side.
    """


@pytest.fixture
def parser():
    return function_parser(sized, "info")


def test_values_are_plain_numbers(parser):
    options = parser.parse_args(["--side", "5", "--rate", "2", "--share", "0", "--sides", "[1,2]"])
    values = [options.side, options.rate, options.share, *options.sides]
    assert values == [5, 2.0, 0.0, 1, 2]
    assert [type(value) for value in values] == [int, float, float, int, int]


def test_the_help_shows_the_range(parser):
    assert "(type: int from 1 to 1e9, default: 3)" in " ".join(parser.format_help().split())


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("side", ["0", "-1", "1.5", "2000000000", "true", "x", "[1]"]),
        ("rate", ["0", "-1e-9", "nan", "inf", "true", "x"]),
        ("share", ["-0.1", "1", "1.0", "nan"]),
    ],
)
def test_a_value_outside_the_range_is_refused_from_the_command_line_and_from_a_file(parser, option, values, tmp_path):
    for value in values:
        (tmp_path / "config.yaml").write_text(f"{option}: {value.replace('nan', '.nan').replace('inf', '.inf')}")
        for args in ([f"--{option}={value}"], [f"--config={tmp_path / 'config.yaml'}"]):
            with pytest.raises(ArgumentError):
                parser.parse_args(args)


@pytest.mark.parametrize("ends", [(0.5, 0.2), (1, 0)])
def test_a_range_rises(ends):
    with pytest.raises(UserError, match="--scale"):
        check_rising("--scale", ends)
    check_rising("--scale", (0, math.pi))

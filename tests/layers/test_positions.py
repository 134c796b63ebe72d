import math

import pytest
import torch

from mim.layers.positions import sincos_positions, stretch_positions


def test_every_entry_follows_the_formula():
    table = sincos_positions((2, 3), 8, num_prefix=1)
    row, column = 1, 2
    angles = [(position, 10000 ** -(k / 2)) for position in (column, row) for k in (0, 1)]
    sin, cos = ([f(p * w) for p, w in angles] for f in (math.sin, math.cos))
    expected = [*sin[:2], *cos[:2], *sin[2:], *cos[2:]]
    assert table[0, 1 + row * 3 + column].tolist() == pytest.approx(expected, abs=1e-7)


def test_prefix_rows_are_zero():
    table = sincos_positions((2, 2), 8, num_prefix=2)
    assert table.shape == (1, 6, 8)
    assert not table[:, :2].any()


def test_the_first_half_of_the_channels_changes_with_the_column_only():
    table = sincos_positions((3, 3), 16).view(3, 3, 16)
    assert torch.equal(table[0, 1, 8:], table[0, 2, 8:])
    assert not torch.equal(table[0, 1, :8], table[0, 2, :8])
    assert torch.equal(table[1, 0, :8], table[2, 0, :8])


def test_a_width_that_is_no_multiple_of_four_is_refused():
    with pytest.raises(ValueError, match="multiple of 4, not 30"):
        sincos_positions((2, 2), 30)


def test_stretching_keeps_the_prefix_and_the_table_of_the_same_grid():
    table = torch.randn(1, 197, 8)
    assert stretch_positions(table, (14, 14), (14, 14), 1) is table
    small = stretch_positions(table, (14, 14), (6, 6), 1)
    assert small.shape == (1, 37, 8)
    assert torch.equal(small[:, 0], table[:, 0])


def test_stretching_follows_the_rule_of_the_reference():
    table = torch.randn(1, 196, 4)
    square = table.view(1, 14, 14, 4).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(square, scale_factor=(6.1 / 14, 3.1 / 14), mode="bicubic")
    torch.testing.assert_close(stretch_positions(table, (14, 14), (6, 3), 0), expected.flatten(2).transpose(1, 2))

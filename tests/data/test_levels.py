import numpy as np
import torch

from mim.data.levels import BINS, levels
from mim.data.pixels import Pixels


class Numbers:
    """Two images of one channel: one of whole numbers, one that lacks half of its pixels."""

    classes, labels = [], None

    def __len__(self):
        return 2

    def read(self, index):
        values = torch.arange(4.0).view(1, 2, 2)
        return values if index == 0 else torch.where(values < 2, torch.nan, values)


def test_levels_count_what_was_measured_and_how_much_lies_outside_the_scale():
    found = levels(Numbers(), Pixels(low=(0.0,), high=(2.0,), type="float32"))
    assert (found.low, found.high, found.images) == (0.0, 3.0, 2)
    assert found.distinct == [4]
    assert found.missing == 0.25
    assert found.outside == round(2 / 6, 5)  # the two threes
    assert len(found.shares[0]) == BINS
    assert np.isclose(sum(found.shares[0]), 1, atol=1e-4)

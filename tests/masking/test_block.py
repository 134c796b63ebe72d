import math

import pytest
import torch

from mim.masking import BlockMasking
from mim.randomness import RowGenerator


def slow_mask(low, high, whole, rows, columns, numbers):
    """One image, one rectangle after the other, from the uniform ``numbers`` of its row."""
    (gate, share), draws = numbers
    target = 0.0 if gate < whole else (low + (high - low) * share) * rows * columns
    hidden = set()
    for areas, aspects, tops, lefts in draws:
        room, smallest = target - len(hidden), (min(rows, columns) // 3) ** 2
        for a, b, c, d in zip(areas, aspects, tops, lefts, strict=True):
            area = smallest + (room - smallest) * a
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * b)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = int(c * (rows - height + 1)), int(d * (columns - width + 1))
            block = {(i, j) for i in range(top, top + height) for j in range(left, left + width)} - hidden
            if 0 < len(block) <= room:
                hidden |= block
                break
        else:
            break
    return [(i, j) in hidden for i in range(rows) for j in range(columns)]


@pytest.mark.parametrize("grid", [(14, 14), (6, 6), (5, 9)])
def test_masks_equal_a_slow_loop(grid):
    keys = torch.arange(60)
    masks = BlockMasking(0.1, 0.5, 0.2)(60, grid, generator=RowGenerator(keys))
    rows = RowGenerator(keys)
    numbers = zip(rows.rand(2).double().tolist(), rows.rand(32, 4, 10).double().tolist(), strict=True)
    assert masks.tolist() == [slow_mask(0.1, 0.5, 0.2, *grid, row) for row in numbers]


@pytest.mark.parametrize(
    ("ratio", "mean", "full"), [(0.1, 17.6, 0.29), (0.3, 57.3, 0.59), (0.5, 97.5, 0.70)], ids=["0.1", "0.3", "0.5"]
)
def test_counts_are_distributed_as_in_the_reference(ratio, mean, full):
    counts = BlockMasking(ratio, ratio, unmasked_share=0)(3000, (14, 14)).sum(1).float()
    target = math.floor(ratio * 196 + 1e-9)
    assert counts.max() <= target
    assert counts.mean().item() == pytest.approx(mean, abs=0.15)
    assert (counts == target).float().mean().item() == pytest.approx(full, abs=0.04)


def test_the_default_leaves_half_of_the_images_unmasked():
    share = BlockMasking()(4000, (14, 14)).float().mean(1)
    assert (share == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert share[share > 0].mean().item() == pytest.approx(0.293, abs=0.01)


def test_a_mask_depends_on_its_row_alone():
    masking = BlockMasking()
    everything = masking(6, (14, 14), generator=RowGenerator.for_rows(seed=7, first=0, count=6))
    part = masking(2, (14, 14), generator=RowGenerator.for_rows(seed=7, first=4, count=2))
    assert torch.equal(everything[4:], part)


def test_there_is_no_common_count():
    assert BlockMasking().visible_count(196) is None


@pytest.mark.parametrize("arguments", [(0.5, 0.1), (0.1, 1.0), (-0.1, 0.5), (0.1, 0.5, 1.5)])
def test_ratios_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="need 0 <="):
        BlockMasking(*arguments)

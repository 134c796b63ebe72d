import math

import pytest
import torch

from mim.masking import RectangleMasking
from mim.masking.rectangle import rectangles
from mim.randomness import RowGenerator

GRIDS = [(14, 14), (6, 4), (2, 18), (16, 3), (1, 7), (32, 32)]


def slow_mask(ratio, inverse, rolled, rows, columns, numbers, shifts):
    """One image, from the uniform numbers of its row."""
    hidden = int(rows * columns * ratio)
    count = rows * columns - hidden if inverse else hidden
    low, high = (min(max(math.log(a), math.log(count / columns**2)), math.log(rows**2 / count)) for a in (0.5, 2))
    aspect = math.exp(low + (high - low) * numbers[0])
    height = min(math.ceil(math.sqrt(count * aspect) - 1e-4), rows)
    width = min(math.ceil(math.sqrt(count / aspect) - 1e-4), columns)
    top, left = int(numbers[1] * (rows - height + 1)), int(numbers[2] * (columns - width + 1))
    block = [(i, j) for i in range(top, top + height) for j in range(left, left + width)][:count]
    down, right = (int(shifts[0] * rows), int(shifts[1] * columns)) if rolled else (0, 0)
    block = {((i + down) % rows, (j + right) % columns) for i, j in block}
    return [((i, j) in block) != inverse for i in range(rows) for j in range(columns)]


@pytest.mark.parametrize("rolled", [True, False])
@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("grid", [(14, 14), (6, 4), (2, 18)])
def test_masks_equal_a_slow_loop(grid, inverse, rolled):
    keys = torch.arange(60)
    masks = RectangleMasking(0.65, inverse, rolled)(60, grid, generator=RowGenerator(keys))
    rows = RowGenerator(keys)
    numbers = zip(rows.rand(3).double().tolist(), rows.rand(2).double().tolist(), strict=True)
    expected = [slow_mask(0.65, inverse, rolled, *grid, *row) for row in numbers]
    assert sum(mask == slow for mask, slow in zip(masks.tolist(), expected, strict=True)) >= 59  # a root on the edge


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.65, 0.99])
@pytest.mark.parametrize("inverse", [True, False])
def test_the_number_of_hidden_patches_is_exact_on_every_grid(grid, ratio, inverse):
    policy, patches = RectangleMasking(ratio, inverse), math.prod(grid)
    mask = policy(200, grid)
    assert mask.sum(1).tolist() == [int(patches * ratio)] * 200
    assert policy.visible_count(patches) == patches - int(patches * ratio)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_count_has_a_rectangle(grid):
    numbers = torch.rand(20, 3)
    numbers[:3] = torch.tensor([[0.0] * 3, [1 - 2**-24] * 3, [0.5] * 3])
    for count in range(math.prod(grid) + 1):
        assert rectangles(numbers, grid, count).sum((1, 2)).tolist() == [count] * 20


def test_an_inverse_mask_leaves_one_piece_visible():
    masks = RectangleMasking(0.65, inverse=True, rolled=False)(50, (14, 14)).view(50, 14, 14)
    for mask in ~masks:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert 0.45 < height / width < 2.2
        assert height * width - int(mask.sum()) < height + width  # but for the last row of the rectangle


def test_rolled_masks_hide_every_place_equally_often_and_others_the_border_more():
    shares = [
        RectangleMasking(0.65, rolled=rolled)(6000, (6, 6)).view(-1, 6, 6).float().mean(0) for rolled in (True, False)
    ]
    assert shares[0].sub(23 / 36).abs().max() < 0.03
    assert shares[1][0, 0] > 0.85


@pytest.mark.parametrize("ratio", [-0.1, 1.0, math.nan])
def test_a_ratio_that_cannot_be_is_refused(ratio):
    with pytest.raises(ValueError, match="outside"):
        RectangleMasking(ratio)

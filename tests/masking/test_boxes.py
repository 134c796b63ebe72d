import pytest
import torch

from mim.encoder import Encoder
from mim.masking import BoxMasking
from mim.methods import MAE
from mim.randomness import RowGenerator

HEAD, LINE, STAMP = (0.0, 0.0, 1.0, 0.25), (0.0, 0.5, 0.5, 0.75), (0.75, 0.75, 1.0, 1.0)


def slow_mask(boxes, ratio, rows, columns, turns, rest):
    """One image, box after box in the order of their uniform numbers, then other patches."""
    count = rows * columns - int(rows * columns * (1 - ratio))
    order = []
    for number in sorted(range(len(boxes)), key=lambda number: turns[number]):
        left, top, right, bottom = boxes[number]
        for row in range(rows):
            for column in range(columns):
                inside = column / columns < right and (column + 1) / columns > left
                if inside and row / rows < bottom and (row + 1) / rows > top:
                    order.append(row * columns + column)
    order = list(dict.fromkeys(order))
    order += [place for place in sorted(range(rows * columns), key=lambda place: rest[place]) if place not in order]
    return [place in order[:count] for place in range(rows * columns)]


@pytest.mark.parametrize("grid", [(8, 8), (4, 6), (3, 5)])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6, 0.9])
def test_masks_equal_a_slow_loop(grid, ratio):
    boxes, keys = [HEAD, LINE, STAMP, (0.1, 0.1, 0.3, 0.6)], torch.arange(30)
    masks = BoxMasking(boxes, ratio)(30, grid, generator=RowGenerator(keys))
    rows = RowGenerator(keys)
    numbers = zip(rows.rand(4).tolist(), rows.rand(grid[0] * grid[1]).tolist(), strict=True)
    assert masks.tolist() == [slow_mask(boxes, ratio, *grid, *row) for row in numbers]


def test_a_box_is_hidden_whole_where_there_is_room():
    masks = BoxMasking([HEAD, LINE], 0.25)(20, (4, 4)).view(-1, 4, 4)
    assert all(mask[0].all() or mask[2, :2].all() for mask in masks)


def test_a_patch_belongs_to_a_box_that_touches_any_of_its_area_and_to_none_that_ends_at_its_edge():
    mask = BoxMasking([(0.5, 0.0, 0.51, 0.5)], 0.5)(1, (2, 2))
    assert mask[0, :3].tolist().count(True) in (1, 2)
    assert mask[0, 1]


def test_a_box_from_edge_to_edge_of_patches_holds_no_others():
    for first in range(9):
        box = (first / 10, 0.3, (first + 1) / 10, 0.4)
        assert BoxMasking([box], 0.01)(1, (10, 10)).nonzero().tolist() == [[0, 30 + first]]


@pytest.mark.parametrize("box", [(0, 0, 0, 1), (0.5, 0, 0.4, 1), (0, 0, 1, 1.1), (-0.1, 0, 1, 1)])
def test_a_box_that_is_none_is_refused(box):
    with pytest.raises(ValueError, match="is not left, top, right, bottom"):
        BoxMasking([box])


def test_no_boxes_are_refused():
    with pytest.raises(ValueError, match="no boxes"):
        BoxMasking([])


def test_mae_trains_with_it():
    encoder = Encoder("vit_tiny_patch16_224", 32, 8, kwargs={"embed_dim": 16, "depth": 1, "num_heads": 2})
    method = MAE(encoder, BoxMasking([HEAD, LINE]), decoder_width=16, decoder_depth=1, decoder_heads=2)
    method.log = lambda *_, **__: None
    method.training_step(([torch.randn(2, 3, 32, 32)], torch.zeros(2)), 0).backward()
    assert encoder.vit.cls_token.grad.any()
    assert "BoxMasking(2 boxes, ratio=0.3) hides 5 of 16" in method.mask_words()

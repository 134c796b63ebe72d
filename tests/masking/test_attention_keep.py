import pytest
import torch

from mim.masking import AttentionKeepMasking, AttentionMasking


def slow_mask(scores, rows, columns, cell, ratio):
    """One image: means of squares, the highest of them kept whole."""
    squares = {}
    for top in range(0, rows, cell):
        for left in range(0, columns, cell):
            places = [(top + i) * columns + left + j for i in range(cell) for j in range(cell)]
            squares[tuple(places)] = sum(scores[place] for place in places) / cell**2
    kept = sorted(squares, key=lambda places: -squares[places])[: int(len(squares) * (1 - ratio)) + 1]
    visible = {place for places in kept for place in places}
    return [place not in visible for place in range(rows * columns)]


@pytest.mark.parametrize(("grid", "cell"), [((14, 14), 2), ((6, 4), 2), ((6, 9), 3), ((4, 4), 1)])
def test_masks_equal_a_slow_loop(grid, cell):
    scores = torch.rand(10, grid[0] * grid[1])
    mask = AttentionKeepMasking(0.5, cell)(10, grid, scores=scores)
    assert mask.tolist() == [slow_mask(row, *grid, cell, 0.5) for row in scores.double().tolist()]


def test_a_hundred_of_196_patches_stay_as_in_the_reference():
    policy = AttentionKeepMasking()
    assert policy.visible_count(196) == 100
    assert (~policy(3, (14, 14), scores=torch.rand(3, 196))).sum(1).tolist() == [100] * 3


def test_nothing_is_hidden_at_ratio_0():
    assert not AttentionKeepMasking(0.0)(2, (4, 4), scores=torch.rand(2, 16)).any()


def test_of_equal_scores_the_first_squares_stay():
    mask = AttentionKeepMasking(0.75, 2)(1, (4, 4), scores=torch.zeros(1, 16))
    assert mask.view(4, 4).tolist() == [[False] * 4] * 2 + [[True] * 4] * 2


def test_single_patches_are_the_mirror_of_attmask_but_for_one():
    scores = torch.rand(5, 16)
    high = AttentionMasking("high", low=0.5, high=0.5, unmasked_share=0.0)(5, (4, 4), scores=scores)
    keep = AttentionKeepMasking(0.5, 1)(5, (4, 4), scores=scores)
    assert (high == keep).sum(1).tolist() == [1] * 5

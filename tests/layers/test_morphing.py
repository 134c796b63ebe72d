import pytest
import torch
from fake_gpu import CUDA, machine

from mim.layers.morphing import group_means, merge_counts, morph


@pytest.mark.parametrize(
    ("merged", "rounds", "counts"),
    [(0, 3, [0, 0, 0]), (6, 3, [2, 2, 2]), (7, 3, [3, 3, 3]), (16, 1, [8]), (16, 3, [5, 5, 3]), (15, 14, [1] * 14)],
)
def test_rounds_take_equal_shares_and_at_most_half_of_what_is_left(merged, rounds, counts):
    assert merge_counts(16, merged, rounds) == counts


@pytest.mark.parametrize("counts", [[0], [3, 2], [8, 4, 2, 1]])
def test_groups_are_numbered_without_gaps_and_hold_every_token_once(counts):
    groups = 16 - sum(counts)
    assign = morph(torch.randn(5, 16, 4), counts, torch.rand(5, len(counts), 16))
    assert [sorted(set(row)) for row in assign.tolist()] == [list(range(groups))] * 5
    assert group_means(torch.randn(5, 16, 4), assign, groups)[1].sum(dim=1).tolist() == [16] * 5


def test_nothing_merged_leaves_every_token_alone():
    assert torch.equal(morph(torch.randn(2, 6, 4), [0], torch.rand(2, 1, 6)), torch.arange(6).expand(2, 6))


def test_a_round_joins_the_pair_that_is_most_alike():
    draws = torch.tensor([[[0.1, 0.6, 0.2, 0.7]]])  # first half: 0 and 2, second: 1 and 3
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.5]]])
    assign = morph(tokens, [1], draws)[0]
    assert assign[2] == assign[1]
    assert len({int(assign[index]) for index in (0, 1, 3)}) == 3


def test_means_are_those_of_a_slow_loop_and_leave_out_what_was_not_measured():
    tokens, assign = torch.randn(2, 9, 3), torch.randint(4, (2, 9))
    measured = torch.rand(2, 9) > 0.3
    means, sizes = group_means(tokens, assign, 4, measured)
    for image in range(2):
        for group in range(4):
            rows = tokens[image][(assign[image] == group) & measured[image]]
            assert sizes[image, group] == len(rows)
            torch.testing.assert_close(means[image, group], rows.sum(0) / max(1, len(rows)))


def test_it_never_waits_for_the_device():
    with machine():
        assert morph(torch.empty(2, 9, 3, device=CUDA), [4, 2], torch.empty(2, 2, 9, device=CUDA)).shape == (2, 9)

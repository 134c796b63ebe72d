import pytest
import torch

from mim.reduction import Tokens


def sequence(values, num_prefix=1):
    """Tokens of width 1 after prefix tokens of -1."""
    prefix = torch.full((1, num_prefix, 1), -1.0)
    return Tokens.start(torch.cat([prefix, torch.tensor(values)[None, :, None]], dim=1), num_prefix, (1, len(values)))


def rows(*indices):
    return torch.tensor([indices])


def patches(tokens):
    return tokens.patches.flatten().tolist()


def test_dropped_tokens_are_parked_and_put_back_in_their_place():
    tokens = sequence([10.0, 11.0, 12.0, 13.0, 14.0]).keep(rows(1, 3, 4), rows(0, 2))
    assert patches(tokens) == [11, 13, 14]
    assert tokens.assign.tolist() == [[~0, 0, ~1, 1, 2]]
    tokens = tokens.keep(rows(2, 0), rows(1))
    assert patches(tokens) == [14, 11]
    assert tokens.assign.tolist() == [[~0, 1, ~1, ~2, 0]]
    assert tokens.with_x(tokens.x * 100).dense().flatten().tolist() == [10, 1100, 12, 13, 1400]


def test_merged_tokens_are_means_weighted_by_size():
    tokens = sequence([0.0, 6.0, 1.0, 9.0]).merge(centre=rows(1, 3), source=rows(0, 2), target=rows(0, 0))
    assert patches(tokens) == [torch.tensor(7 / 3).item(), 9]
    assert tokens.assign.tolist() == [[0, 0, 0, 1]]
    assert tokens.sizes.tolist() == [[3, 1]]
    tokens = tokens.merge(centre=rows(0), source=rows(1), target=rows(0))
    assert patches(tokens) == [4]
    assert tokens.patch_mean().item() == 4
    assert tokens.dense().flatten().tolist() == [4, 4, 4, 4]


def test_a_token_that_nothing_is_merged_into_stays_to_the_bit():
    tokens = Tokens.start(torch.randn(2, 7, 5), 1)
    pair = torch.tensor([[0, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    merged = tokens.merge(pair, torch.tensor([[1], [0]]), torch.tensor([[4], [0]]))
    assert torch.equal(merged.patches[0, :4], tokens.patches[0, [0, 2, 3, 4]])
    assert torch.equal(merged.patches[1, 1:], tokens.patches[1, [4, 3, 2, 1]])


def test_patches_merged_before_a_drop_come_back_together():
    tokens = sequence([2.0, 4.0, 8.0]).merge(rows(0, 2), rows(1), rows(0)).keep(rows(1), rows(0))
    assert tokens.assign.tolist() == [[~0, ~0, 0]]
    assert tokens.sizes.tolist() == [[1]]
    assert tokens.dense().flatten().tolist() == [3, 3, 8]


def test_all_patches_rejoin_as_their_own_tokens():
    tokens = sequence([1.0, 2.0, 3.0]).keep(rows(2), rows(0, 1)).rejoined()
    assert tokens.x.flatten().tolist() == [-1, 1, 2, 3]
    assert tokens.assign.tolist() == [[0, 1, 2]]
    assert tokens.parked == ()


def test_the_mean_over_patches_counts_sizes():
    tokens = sequence([1.0, 1.0, 1.0, 5.0]).merge(rows(0, 3), rows(1, 2), rows(0, 0))
    assert tokens.patch_mean().tolist() == [[2]]


def test_bias_is_the_logarithm_of_the_size_and_zero_for_the_prefix():
    tokens = sequence([1.0, 1.0, 5.0], num_prefix=2)
    assert tokens.inputs(0, proportional=True) == {}
    bias = tokens.merge(rows(0, 2), rows(1), rows(0)).inputs(0, proportional=True)["attn_mask"]
    torch.testing.assert_close(bias, torch.tensor([0, 0, 2, 1]).clamp(min=1).log()[None, None, None])


def test_sizes_are_counted_in_full_precision():
    """Half precision cannot count to 257: its mean of 257 patches of 0 and one of 258 would not be 1."""
    x = torch.zeros(1, 258, 1)
    x[:, 257] = 258.0
    tokens = Tokens.start(x.bfloat16(), 0)
    folded = torch.arange(1, 257)[None]
    tokens = tokens.merge(rows(0, 257), folded, torch.zeros_like(folded))
    assert tokens.sizes.tolist() == [[257, 1]]
    assert tokens.patch_mean().item() == 1


def test_a_token_for_no_patch_is_attended_to_once_and_counts_for_nothing():
    tokens = sequence([1.0, 1.0, 5.0]).merge(rows(0, 2), rows(1), rows(0)).extended(torch.full((1, 1, 1), 100.0))
    assert tokens.sizes.tolist() == [[2, 1, 0]]
    assert tokens.inputs(0, proportional=True)["attn_mask"].exp().flatten().tolist() == [1, 2, 1, 1]
    assert tokens.dense().flatten().tolist() == [1, 1, 5]
    assert tokens.patch_mean().item() == pytest.approx(7 / 3)

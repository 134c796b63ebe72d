import torch

from mim.masking import RandomMasking, SampledMasking
from mim.randomness import RowGenerator


def test_exactly_as_many_patches_stay_visible_as_with_random_masks():
    mask = SampledMasking(0.7)(50, (5, 3), scores=10 * torch.randn(50, 15))
    assert (~mask).sum(1).tolist() == [RandomMasking(0.7).visible_count(15)] * 50


def test_with_equal_scores_every_patch_stays_equally_often():
    kept = (~SampledMasking(0.75)(8000, (4, 4), scores=torch.full((8000, 16), 3.0))).sum(0).double()
    chi_square = ((kept - 2000) ** 2 / 2000).sum()
    assert chi_square < 37.7  # 15 degrees of freedom: exceeded once in a thousand seeds, and the seed is fixed


def test_a_single_patch_is_drawn_by_its_probability():
    share = torch.tensor([0.1, 0.2, 0.3, 0.4])
    kept = ~SampledMasking(0.75)(20_000, (2, 2), scores=-share.log().expand(20_000, -1))
    torch.testing.assert_close(kept.float().mean(0), share, atol=0.015, rtol=0)


def test_the_second_patch_is_drawn_from_what_is_left():
    share = torch.tensor([0.7, 0.1, 0.1, 0.1])
    kept = ~SampledMasking(0.5)(20_000, (2, 2), scores=-share.log().expand(20_000, -1))
    # First in the first draw, or in the second from what is left without another: 0.7 + 0.3 * 0.7 / 0.9.
    torch.testing.assert_close(kept[:, 0].float().mean().item(), 0.7 + 0.3 * 0.7 / 0.9, atol=0.015, rtol=0)


def test_a_row_draws_the_same_whatever_else_is_in_the_batch():
    scores = torch.randn(6, 16)
    whole = SampledMasking()(6, (4, 4), scores=scores, generator=RowGenerator.for_rows(1, 0, 6))
    part = SampledMasking()(2, (4, 4), scores=scores[4:], generator=RowGenerator.for_rows(1, 4, 2))
    assert torch.equal(whole[4:], part)


def test_scores_without_bounds_do_not_change_the_count():
    scores = torch.tensor([[-1e30, 1e30, 0.0, 0.0]])
    mask = SampledMasking(0.5)(1, (2, 2), scores=scores)
    assert mask[0, :2].tolist() == [False, True]
    assert mask.sum() == 2

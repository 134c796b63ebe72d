import pytest
import torch

from mim.masking import AttentionMasking
from mim.randomness import RowGenerator

GRID, PATCHES = (14, 14), 196


def rows(count, seed=0, first=0):
    return RowGenerator.for_rows(seed, first, count)


@pytest.fixture
def scores():
    return torch.rand(64, PATCHES)


def masks(scores, mode="high", ratio=0.3, unmasked_share=0.5, seed=0, **arguments):
    masking = AttentionMasking(mode, ratio, ratio, unmasked_share, **arguments)
    return masking(len(scores), GRID, scores=scores, generator=rows(len(scores), seed))


@pytest.mark.parametrize("mode", ["high", "low"])
def test_what_is_hidden_is_scored_beyond_what_is_visible(scores, mode):
    for score, mask in zip(scores, masks(scores, mode), strict=True):
        if mask.any() and mode == "high":
            assert score[mask].min() >= score[~mask].max()
        elif mask.any():
            assert score[mask].max() <= score[~mask].min()


def test_hidden_patches_are_the_highest_scored():
    scores = torch.tensor([[0.1, 0.9, 0.4, 0.8]])
    assert AttentionMasking("high", 0.5, 0.5, 0.0)(1, (2, 2), scores=scores).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(("ratio", "high", "hint"), [(0.1, 19, 18), (0.3, 58, 53), (0.5, 98, 89)])
def test_counts_are_those_of_the_reference(scores, ratio, high, hint):
    for mode, count in (("high", high), ("low", high), ("hint", hint)):
        assert set(masks(scores, mode, ratio).sum(1).tolist()) == {0, count}


def test_all_images_of_a_step_share_a_ratio_that_changes_from_step_to_step(scores):
    counts = []
    for seed in range(20):
        mask = AttentionMasking(unmasked_share=0.0)(64, GRID, scores=scores, generator=rows(64, seed))
        (count,) = set(mask.sum(1).tolist())
        counts.append(count)
    assert 19 <= min(counts) < 40
    assert 78 < max(counts) <= 98


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_images_stays_unmasked(share):
    mask = masks(torch.rand(4000, PATCHES), unmasked_share=share)
    assert (~mask.any(1)).float().mean().item() == pytest.approx(share, abs=0.025)


def test_hint_reveals_some_of_the_most_attended(scores):
    high, hint = masks(scores, "high", unmasked_share=0.0), masks(scores, "hint", unmasked_share=0.0)
    top = torch.zeros_like(high).scatter(1, scores.argsort(1, descending=True)[:, :19], True)
    assert not (hint & ~high).any()
    assert (high & ~hint).sum(1).tolist() == [5] * 64  # int(196 * 0.1 * 0.3)
    assert not (high & ~hint & ~top).any()


def test_hints_are_spread_evenly_over_the_top():
    scores = torch.arange(PATCHES).float().expand(4000, -1)
    revealed = masks(scores, "high", unmasked_share=0.0) & ~masks(scores, "hint", unmasked_share=0.0)
    share = revealed[:, -19:].float().mean(0)
    torch.testing.assert_close(share, torch.full((19,), 5 / 19), atol=0.03, rtol=0)
    assert len(revealed.unique(dim=0)) > 1000


def test_revealing_or_hiding_nothing_is_allowed():
    scores = torch.rand(3, 36)
    hint = AttentionMasking("hint", 0.1, 0.1, 0.0)(3, (6, 6), scores=scores)
    assert torch.equal(hint, AttentionMasking("high", 0.1, 0.1, 0.0)(3, (6, 6), scores=scores))
    assert not AttentionMasking("hint", 0.0, 0.0, 0.0)(3, (6, 6), scores=scores).any()


def test_a_planted_peak_is_hidden_by_high_and_never_by_low(scores):
    scores[:, 77] = 5.0
    high, low = masks(scores, "high", 0.5), masks(scores, "low", 0.5)
    assert high[high.any(1)][:, 77].all()
    assert not low[:, 77].any()


def test_the_mask_of_an_image_follows_its_own_scores(scores):
    order = torch.randperm(32)
    permuted = torch.cat([scores[:32][order], scores[32:]])
    first, second = masks(scores, unmasked_share=0.0), masks(permuted, unmasked_share=0.0)
    assert torch.equal(second[:32], first[:32][order])
    assert torch.equal(second[32:], first[32:])


@pytest.mark.parametrize("mode", ["high", "hint", "low"])
def test_ranks_cut_the_batch_without_changing_masks(scores, mode):
    masking = AttentionMasking(mode)
    whole = masking(64, GRID, scores=scores, generator=rows(64, 3))
    parts = [masking(32, GRID, scores=scores[i : i + 32], generator=rows(32, 3, i)) for i in (0, 32)]
    assert torch.equal(torch.cat(parts), whole)


def test_any_grid_will_do():
    assert AttentionMasking(unmasked_share=0.0, low=0.5)(2, (3, 5), scores=torch.rand(2, 15)).sum(1).tolist() == [7, 7]


def test_the_mask_has_no_graph(scores):
    assert not masks(scores.requires_grad_()).requires_grad


@pytest.mark.parametrize("arguments", [("hihg",), ("high", 0.5, 0.1), ("high", 0.1, 1.0), ("high", 0.1, 0.5, 1.5)])
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"need 0 <=|is none of"):
        AttentionMasking(*arguments)


def test_a_policy_prints_its_settings():
    expected = "AttentionMasking(mode=low, show_max=0.1, low=0.1, high=0.5, unmasked_share=0.5)"
    assert str(AttentionMasking("low")) == expected


@pytest.mark.parametrize(("mode", "show_max"), [("high", 0.1), ("low", 0.1), ("hint", 0.1), ("hint", 0.3)])
def test_one_ratio_for_all_leaves_as_many_visible_as_announced(scores, mode, show_max):
    masking = AttentionMasking(mode, 0.75, 0.75, 0.0, show_max)
    mask = masking(len(scores), GRID, scores=scores)
    assert (~mask).sum(1).tolist() == [masking.visible_count(PATCHES)] * len(scores)


@pytest.mark.parametrize("arguments", [{"low": 0.5}, {"unmasked_share": 0.1}, {"low": 0.05, "high": 0.05}])
def test_counts_that_differ_are_not_announced(arguments):
    settings = {"mode": "hint", "low": 0.75, "high": 0.75, "unmasked_share": 0.0} | arguments
    assert AttentionMasking(**settings).visible_count(PATCHES) is None

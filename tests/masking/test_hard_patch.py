import pytest
import torch

from mim.masking import HardPatchMasking, RandomMasking
from mim.randomness import RowGenerator

GRID = (14, 14)


def rows(count=4, seed=7):
    return RowGenerator.for_rows(seed=seed, first=0, count=count)


def slow_mask(scores, noise, visible, hard):
    """One image: the highest scores are hidden, and of the rest all but those with the least noise."""
    forced = sorted(range(len(scores)), key=lambda i: -scores[i])[:hard]
    rest = sorted(set(range(len(scores))) - set(forced), key=lambda i: noise[i])
    return [i not in rest[:visible] for i in range(len(scores))]


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_masks_equal_a_slow_loop(progress):
    masking, scores = HardPatchMasking(0.7), torch.randn(5, 30)
    masks = masking(5, (5, 6), scores=scores, progress=progress, generator=rows(5))
    hard = int(21 * 0.5 * progress)
    slow = [slow_mask(s, n, 9, hard) for s, n in zip(scores.tolist(), rows(5).rand(30).tolist(), strict=True)]
    assert masks.tolist() == slow


SCORES = {
    "random": torch.randn(4, 196, generator=torch.Generator().manual_seed(0)),
    "equal": torch.zeros(4, 196),
    "few values": torch.arange(196).remainder(3).float().expand(4, 196),
    "endless": torch.full((4, 196), torch.inf),
    "not a number": torch.full((4, 196), torch.nan),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize(("ratio", "hidden"), [(0.75, 147), (0.9, 177), (0.0, 0)])
def test_every_image_hides_the_same_count_at_every_share(scores, ratio, hidden):
    for share in (0.0, 0.1, 0.5, 1.0):
        mask = HardPatchMasking(ratio, start=share, end=share)(4, GRID, scores=scores)
        assert mask.dtype == torch.bool
        assert mask.sum(1).tolist() == [hidden] * 4


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_hardest_are_always_hidden(share):
    masking = HardPatchMasking(start=share, end=share)
    hardest = SCORES["random"].topk(int(147 * share)).indices
    for seed in range(20):
        mask = masking(4, GRID, scores=SCORES["random"], generator=rows(seed=seed))
        assert mask.gather(1, hardest).all()


@pytest.mark.parametrize(
    ("epochs", "first", "half_way"), [(100, 1, 36), (200, 2, 36), (400, 5, 36), (800, 10, 36), (1600, 21, 36)]
)
def test_stairs_give_the_counts_of_the_reference(epochs, first, half_way):
    masking = HardPatchMasking(stairs=epochs)
    counts = [masking.hard_count(196, epoch / epochs) for epoch in range(epochs)]
    assert counts == [int(147 * 0.5 * (epoch + 1) / epochs) for epoch in range(epochs)]
    assert counts.index(1) == first
    assert counts[epochs // 2 - 1] == half_way
    assert counts[-1] == masking.hard_count(196, 1.0) == 73


def test_a_stair_lasts_one_epoch_and_no_step_longer():
    masking, steps = HardPatchMasking(stairs=7), 7 * 13
    counts = [masking.hard_count(196, step / steps) for step in range(steps)]
    assert counts == [masking.hard_count(196, step // 13 / 7) for step in range(steps)]


def test_without_stairs_the_share_moves_at_every_step_and_may_fall():
    rising, falling = HardPatchMasking(), HardPatchMasking(start=0.5, end=0.0)
    assert [rising.hard_count(196, p) for p in (0.0, 0.5, 1.0)] == [0, 36, 73]
    assert [falling.hard_count(196, p) for p in (0.0, 0.5, 1.0)] == [73, 36, 0]


@pytest.mark.parametrize("masking", [HardPatchMasking(), HardPatchMasking(end=0.0, stairs=10)])
def test_with_nothing_forced_masks_are_those_of_random_masking(masking):
    mask = masking(4, GRID, scores=SCORES["random"], generator=rows())
    assert torch.equal(mask, RandomMasking()(4, GRID, generator=rows()))


def test_the_rest_is_hidden_by_chance():
    scores, masking = torch.arange(12.0).expand(6000, 12), HardPatchMasking(0.75, start=0.5, end=0.5)
    counts = masking(6000, (3, 4), scores=scores, generator=rows(6000)).sum(0)
    assert counts[8:].tolist() == [6000] * 4  # int(9 / 2)
    # Of the other eight five are hidden: chi-square with seven degrees of freedom, 24.3 at one in a thousand.
    expected, variance_share = 6000 * 5 / 8, 1 - 5 / 8
    chi_square = ((counts[:8] - expected).square() / (expected * variance_share)).sum() * 7 / 8
    assert chi_square < 24.3


def test_a_mask_depends_on_its_row_alone():
    masking, scores = HardPatchMasking(start=0.5), torch.randn(6, 16)
    whole = masking(6, (4, 4), scores=scores, generator=rows(6))
    part = RowGenerator.for_rows(seed=7, first=2, count=3)
    assert torch.equal(whole[2:5], masking(3, (4, 4), scores=scores[2:5], generator=part))


def test_nothing_is_read_back_from_the_device():
    generator = RowGenerator.for_rows(7, 0, 4, "meta")
    mask = HardPatchMasking()(4, GRID, scores=torch.randn(4, 196, device="meta"), progress=0.5, generator=generator)
    assert mask.device.type == "meta"


def test_a_policy_that_leaves_all_to_chance_needs_no_scores():
    assert HardPatchMasking().needs_scores
    assert not HardPatchMasking(end=0.0).needs_scores
    assert HardPatchMasking(end=0.0)(2, GRID, progress=0.5).sum(1).tolist() == [147, 147]


@pytest.mark.parametrize("arguments", [{"ratio": 1.0}, {"start": -0.1}, {"end": 1.5}, {"stairs": 0}])
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"outside|lies in|at least one"):
        HardPatchMasking(**arguments)

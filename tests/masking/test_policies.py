"""What every policy does whatever it hides: checks of scores and rows, and random numbers when none are given."""

import pytest
import torch

from mim import masking
from mim.masking import (
    AttentionKeepMasking,
    AttentionMasking,
    BlockMasking,
    BoxMasking,
    HardPatchMasking,
    Masking,
    RandomMasking,
    SampledMasking,
    VaryingRandomMasking,
)
from mim.randomness import RowGenerator

GRID = (6, 4)  # even: the cells of GridMasking are two patches wide
FORM = [(0.0, 0.0, 0.5, 0.2), (0.5, 0.5, 1.0, 1.0)]
POLICIES = [getattr(masking, name) for name in masking.__all__ if name != "Masking"]


def default(policy):
    return policy(FORM) if policy is BoxMasking else policy()


def drawn(policy, count=8, **arguments):
    scores = torch.rand(count, 24, generator=torch.Generator().manual_seed(1)) if policy.guided else None
    return policy(count, GRID, **{"scores": scores, "progress": 0.5} | arguments)


@pytest.mark.parametrize("policy", POLICIES)
def test_masks_are_bools_for_every_image_and_patch_and_hide_no_more_than_announced(policy):
    mask = drawn(default(policy))
    assert (mask.dtype, mask.shape) == (torch.bool, (8, 24))
    assert mask.sum(1).max() <= default(policy).most_hidden(24)


@pytest.mark.parametrize("policy", POLICIES)
def test_without_a_generator_the_global_seed_decides(policy):
    first, second = (torch.manual_seed(seed) and drawn(default(policy)) for seed in (3, 3))
    torch.manual_seed(4)
    assert torch.equal(first, second)
    by_scores_alone = (AttentionMasking, AttentionKeepMasking)
    assert policy in by_scores_alone or not torch.equal(first, drawn(default(policy)))


@pytest.mark.parametrize("policy", POLICIES)
def test_masks_are_drawn_where_the_random_numbers_are_and_given_where_they_are_wanted(policy):
    scores = torch.rand(4, 24, device="meta") if policy.guided else None
    policy = default(policy)
    mask = policy(4, GRID, scores=scores, progress=0.5, generator=RowGenerator.for_rows(0, 0, 4, "meta"))
    assert mask.device.type == "meta"
    assert drawn(policy, generator=RowGenerator.for_rows(0, 0, 8), device="meta").device.type == "meta"


@pytest.mark.parametrize("policy", [AttentionMasking, AttentionKeepMasking, HardPatchMasking, SampledMasking])
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_a_guided_policy_asks_for_scores_from_the_first_step_on(policy, progress):
    with pytest.raises(ValueError, match=f"{policy.__name__} needs scores"):
        policy()(2, GRID, progress=progress)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(3, 24), (4, 23), (4, 24, 1)])
def test_scores_of_another_batch_or_grid_are_refused(policy, shape):
    with pytest.raises(ValueError, match="are not those of 4 images"):
        default(policy)(4, GRID, scores=torch.rand(shape))


@pytest.mark.parametrize("policy", POLICIES)
def test_random_numbers_of_another_batch_are_refused(policy):
    with pytest.raises(ValueError, match="random numbers for 3 images, but there are 8"):
        drawn(default(policy), generator=RowGenerator.for_rows(0, 0, 3))


def test_a_policy_of_ones_own_writes_nothing_but_its_draw():
    class Columns(Masking):
        def draw(self, generator, grid, scores, progress):
            return (torch.arange(grid[1]) % 2 == 1).repeat(len(generator), grid[0])

    assert Columns()(2, (2, 3)).tolist() == [[False, True, False] * 2] * 2


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (RandomMasking(0.75), " hides 18"),
        (HardPatchMasking(0.75), " hides 18"),
        (VaryingRandomMasking(0.5, 0.5, 0.0), " hides 12"),
        (VaryingRandomMasking(0.5, 0.5, 0.5), " hides 0 to 12"),
        (AttentionMasking(), ""),
        (BlockMasking(0.0, 0.0), " hides 0"),
    ],
)
def test_a_policy_says_how_much_it_hides_unless_scores_decide(policy, words):
    state = torch.get_rng_state()
    assert policy.count_words(GRID) == words
    assert torch.equal(torch.get_rng_state(), state)

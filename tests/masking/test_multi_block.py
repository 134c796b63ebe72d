import math

import pytest
import torch

from mim.masking import MultiBlockMasking
from mim.randomness import RowGenerator

GRIDS = [(14, 14), (6, 4), (4, 4), (3, 16), (1, 7), (2, 2), (37, 12)]


def rows(count=64, seed=0, first=0):
    return RowGenerator.for_rows(10_000 * seed, first, count)  # seeds one apart share rows


def drawn(policy=None, grid=(14, 14), count=64, seed=0):
    return (policy or MultiBlockMasking()).blocks(rows(count, seed), grid)


def boxes(targets, grid):
    """Top, left, bottom and right of every block, which must be filled."""
    row, column = targets // grid[1], targets % grid[1]
    top, left, bottom, right = row.amin(-1), column.amin(-1), row.amax(-1) + 1, column.amax(-1) + 1
    assert ((bottom - top) * (right - left) == targets.shape[-1]).all()
    assert (targets.diff(dim=-1) > 0).all()
    return top, left, bottom, right


def slow_context(policy, grid, corners, size, context):
    """Patches of one image's context."""
    *targets, (top, left) = corners
    inside = {(i, j) for i in range(top, top + context[0]) for j in range(left, left + context[1])}
    for above, before in targets:
        inside -= {(i, j) for i in range(above, above + size[0]) for j in range(before, before + size[1])}
    return sorted(i * grid[1] + j for i, j in inside)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("grid", [(14, 14), (6, 8), (5, 30)])
def test_contexts_and_targets_equal_a_slow_loop(grid, released):
    policy, generator = MultiBlockMasking(released=released, least_context=0.001), rows(40)
    hidden, targets = policy(40, grid, generator=rows(40)), policy.blocks(rows(40), grid).targets
    scale, aspect, area = generator.common(3)
    size, context = policy.target_size(grid, scale, scale if released else aspect), policy.context_size(grid, area)
    numbers = generator.rand(5, 2)
    for image, own in enumerate(numbers.tolist()):
        sides = [size] * 4 + [context]
        corners = [
            tuple(int(u * (whole - side + (not released))) for u, whole, side in zip(pair, grid, block, strict=True))
            for pair, block in zip(own, sides, strict=True)
        ]
        assert (~hidden[image]).nonzero()[:, 0].tolist() == slow_context(policy, grid, corners, size, context)
        for block, (top, left) in zip(targets[image].tolist(), corners, strict=False):
            assert block == [(top + i) * grid[1] + left + j for i in range(size[0]) for j in range(size[1])]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", range(5))
def test_no_target_is_in_the_context_and_all_contexts_are_equally_large(grid, seed):
    policy = MultiBlockMasking()
    policy.fit(grid)
    blocks = drawn(policy, grid, 100, seed)
    assert (~blocks.hidden).sum(1).tolist() == [blocks.visible] * 100
    assert blocks.visible >= max(1, math.ceil(0.05 * math.prod(grid)))
    assert blocks.hidden.gather(1, blocks.targets.flatten(1)).all()
    boxes(blocks.targets, grid)


def test_sizes_are_in_their_ranges_and_shared_by_the_batch_of_a_step():
    sizes = set()
    for seed in range(50):
        blocks = drawn(seed=seed, count=8)
        top, left, bottom, right = boxes(blocks.targets, (14, 14))
        (height,), (width,) = (bottom - top).unique().tolist(), (right - left).unique().tolist()
        assert 0.65 < height / width < 1.7  # 0.75 to 1.5, but for rounding
        assert 25 <= height * width <= 42  # 15 to 20 % of 196, but for rounding
        sizes.add((height, width))
    assert len(sizes) > 5


def test_rows_of_a_batch_are_those_of_the_whole_batch():
    policy, whole = MultiBlockMasking(), drawn()
    part = policy.blocks(rows(), (14, 14), slice(16, 32))
    assert torch.equal(part.hidden, whole.hidden[16:32])
    assert torch.equal(part.targets, whole.targets[16:32])
    assert part.visible == whole.visible


def test_the_mask_of_an_image_does_not_depend_on_the_rest_of_the_batch():
    policy = MultiBlockMasking(least_context=0.5)
    whole = policy(64, (14, 14), generator=rows())
    assert torch.equal(policy(16, (14, 14), generator=rows(16, first=16)), whole[16:32])


def test_a_context_is_cut_to_the_smallest_of_the_batch_within_its_own_mask():
    mask, blocks = MultiBlockMasking()(64, (14, 14), generator=rows()), drawn()
    assert (blocks.hidden | ~mask).all()
    assert blocks.visible == int((~mask).sum(1).min())


def test_every_patch_is_seen_and_asked_for():
    blocks = drawn(count=3000)
    seen = (~MultiBlockMasking()(3000, (14, 14), generator=rows(3000))).float().mean(0)
    asked = torch.zeros(3000, 196).scatter(1, blocks.targets.flatten(1), 1.0).mean(0)
    assert seen.min() > 0.02
    assert asked.min() > 0.01


def test_the_released_sampler_never_reaches_the_last_row_and_keeps_the_first_patches():
    blocks = [drawn(MultiBlockMasking(released=True), seed=seed) for seed in range(60)]
    seen = torch.cat([~part.hidden for part in blocks]).float().mean(0).view(14, 14)
    assert seen[13].max() == seen[:, 13].max() == 0
    assert max(int(part.targets.max()) for part in blocks) < 13 * 14
    assert (seen[0, :13].mean() > 0.7, seen[12].mean() < 0.06) == (True, True)  # 0.75 and 0.03 in a re-implementation


def test_the_released_sampler_leaves_what_a_re_implementation_of_it_leaves():
    policy = MultiBlockMasking(released=True)
    before = torch.cat([~policy(64, (14, 14), generator=rows(seed=seed)) for seed in range(100)]).sum(1).float()
    after = torch.tensor([drawn(policy, seed=seed).visible for seed in range(100)]).float()
    assert before.mean().item() == pytest.approx(81.8, abs=2)
    assert after.mean().item() == pytest.approx(53, abs=2)


def test_too_small_a_context_is_drawn_again_and_at_last_all_targets_share_a_place():
    for least in (0.5, 0.999):
        hidden = MultiBlockMasking(least_context=least)(400, (14, 14), generator=rows(400))
        left = (~hidden).sum(1)
        assert left.min() >= 98 if least == 0.5 else left.min() >= 196 * 0.8 - 42


@pytest.mark.parametrize(
    "settings", [{"target_scale": (0.2, 0.1)}, {"context_scale": (0.5, 1.5)}, {"target_aspect": (0.0, 1)}]
)
def test_ranges_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}.*is no range"):
        MultiBlockMasking(**settings)


@pytest.mark.parametrize(("grid", "settings"), [((1, 1), {}), ((14, 14), {"target_scale": (0.1, 0.95)})])
def test_a_grid_on_which_a_target_may_cover_the_context_is_refused(grid, settings):
    with pytest.raises(ValueError, match="may cover a context"):
        MultiBlockMasking(**settings).fit(grid)

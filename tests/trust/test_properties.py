"""What holds for every input, tried on generated ones: masks, patches, positions, schedules, orders, config values."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mim.data.sampler import Shard, StepSampler
from mim.errors import UserError
from mim.layers.positions import stretch_positions
from mim.masking import AttentionMasking, BlockMasking, HardPatchMasking, RandomMasking, VaryingRandomMasking
from mim.patches import patchify, unpatchify
from mim.randomness import RowGenerator
from mim.run.config import flatten, parse
from mim.schedules import cosine, linear, warmup_cosine

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
sides = st.integers(2, 9)
share = st.floats(0, 0.95)
seeds = st.integers(0, 2**63 - 1)


def draw(policy, rows, columns, seed, batch=3, **more):
    scores = torch.rand(batch, rows * columns, generator=torch.Generator().manual_seed(seed % 1000))
    return policy(
        batch, (rows, columns), scores=scores, generator=RowGenerator.for_rows(seed, 0, batch), **more
    ), scores


@few
@given(sides, sides, share, seeds)
def test_random_masks_leave_exactly_their_count(rows, columns, ratio, seed):
    visible = int(rows * columns * (1 - ratio))
    if visible:
        mask, _ = draw(RandomMasking(ratio), rows, columns, seed)
        assert (~mask).sum(1).tolist() == [visible] * 3


@few
@given(sides, sides, share, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), seeds)
def test_hard_masks_keep_the_count_and_hide_the_hardest(rows, columns, ratio, start, end, progress, seed):
    patches = rows * columns
    visible = int(patches * (1 - ratio))
    if visible:
        policy = HardPatchMasking(ratio, start, end)
        mask, scores = draw(policy, rows, columns, seed, progress=progress)
        assert (~mask).sum(1).tolist() == [visible] * 3
        hardest = scores.argsort(dim=1, descending=True, stable=True)[:, : policy.hard_count(patches, progress)]
        assert mask.gather(1, hardest).all()


ranges = st.tuples(share, share).map(sorted)


@few
@given(sides, sides, ranges, st.floats(0, 1), seeds)
def test_masks_with_a_range_of_ratios_never_hide_more_than_the_highest(rows, columns, ratios, whole, seed):
    patches = rows * columns
    low, high = ratios
    for policy in (
        BlockMasking(low, high, whole),
        VaryingRandomMasking(low, high, whole),
        AttentionMasking("high", low, high, whole),
        AttentionMasking("low", low, high, whole),
    ):
        mask, _ = draw(policy, rows, columns, seed)
        assert mask.dtype == torch.bool
        assert mask.shape == (3, patches)
        assert mask.sum(1).max() <= policy.most_hidden(patches) <= patches


@few
@given(sides, sides, seeds, st.integers(1, 5))
def test_masks_of_an_image_do_not_depend_on_how_a_batch_is_cut(rows, columns, seed, cut):
    for policy in (RandomMasking(0.5), BlockMasking(0.1, 0.5, 0.2), VaryingRandomMasking(0.1, 0.5, 0.2)):
        whole = policy(6, (rows, columns), generator=RowGenerator.for_rows(seed, 0, 6))
        parts = [
            policy(count, (rows, columns), generator=RowGenerator.for_rows(seed, first, count))
            for first, count in ((0, cut), (cut, 6 - cut))
        ]
        assert torch.equal(whole, torch.cat(parts))


@few
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.integers(1, 5))
def test_patches_put_together_are_the_image(rows, columns, height, width, channels):
    images = torch.rand(2, channels, rows * height, columns * width)
    patches = patchify(images, (height, width))
    assert patches.shape == (2, rows * columns, channels * height * width)
    assert torch.equal(unpatchify(patches, (rows, columns), (height, width), channels), images)


@few
@given(sides, sides, sides, sides)
def test_positions_keep_their_range_and_stay_if_the_grid_does(rows, columns, new_rows, new_columns):
    positions = torch.rand(1, rows * columns, 4)
    same = stretch_positions(positions, (rows, columns), (rows, columns), 0)
    torch.testing.assert_close(same, positions)
    assert stretch_positions(positions, (rows, columns), (new_rows, new_columns), 0).isfinite().all()


numbers = st.floats(0, 1e3)


@few
@given(st.floats(0, 1), numbers, numbers)
def test_schedules_stay_between_their_ends(progress, start, end):
    low, high = sorted((start, end))
    for schedule in (linear, cosine):
        assert low - 1e-9 * high <= schedule(progress, start, end) <= high * (1 + 1e-9) + 1e-12
        assert math.isclose(schedule(0, start, end), start, abs_tol=1e-9)
        assert math.isclose(schedule(1, start, end), end, rel_tol=1e-9, abs_tol=1e-9)


@few
@given(st.integers(2, 500), st.floats(0, 0.5), st.floats(1e-6, 10))
def test_the_learning_rate_rises_to_its_peak_and_falls(steps, warm, peak):
    warmup = round(warm * steps)
    rates = [warmup_cosine(step, warmup, steps, peak, 0.0) for step in range(steps)]
    assert all(0 <= rate <= peak * (1 + 1e-9) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@few
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_every_image_comes_once_an_epoch_over_all_ranks_and_micro_batches(images, ranks, accumulate, size, seed):
    batch = ranks * accumulate * size
    steps = range(math.ceil(2 * images / batch))
    parts = [StepSampler(images, batch, steps, seed, Shard(rank, ranks, accumulate)) for rank in range(ranks)]
    seen = sorted(key for part in parts for keys in part for key in keys)
    complete = [key for key in seen if key[0] < 2]
    assert complete == [(epoch, index) for epoch in range(2) for index in range(images)]
    alone = StepSampler(images, batch, steps, seed, Shard())
    assert sorted(key for keys in alone for key in keys) == seen


TINY = "--config=tests/tiny.yaml"
keys = st.sampled_from(
    [
        *("epochs", "seed", "pool", "data.path", "data.batch_size", "data.mean", "trainer.precision"),
        *("model", "model.init_args.masking", "model.init_args.optim.blr", "model.init_args.encoder.kwargs"),
    ]
)
values = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["null", "true", "[]", "{}", "[1, 2]", "{a: 1}", "{class_path: os.mkdir}", "os.mkdir", "&a [*a]"]),
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(keys, values)
def test_any_value_is_either_taken_or_refused_in_three_lines(key, value):
    refused = None
    try:
        assert flatten(parse([TINY, f"--{key}={value}"]))
    except UserError as mistake:
        refused = str(mistake)
    assert refused is None or len(refused.splitlines()) <= 3

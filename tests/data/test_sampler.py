"""The order of the images: every one once per epoch, the same for any split, any start."""

from collections import Counter

import pytest

from mim.data.sampler import Shard, StepSampler


def batches(images, batch_size, steps, shard=None, seed=0):
    return list(StepSampler(images, batch_size, steps, seed, shard or Shard()))


def flat(lists):
    return [key for keys in lists for key in keys]


@pytest.mark.parametrize(("images", "batch_size", "steps"), [(12, 4, 9), (10, 4, 5), (7, 3, 14), (5, 8, 5), (1, 2, 3)])
def test_every_image_comes_exactly_once_per_epoch(images, batch_size, steps):
    keys = flat(batches(images, batch_size, range(steps)))
    epochs = len(keys) // images
    assert epochs * images == len(keys)
    assert Counter(keys) == Counter((epoch, index) for epoch in range(epochs) for index in range(images))


def test_epochs_follow_each_other():
    epochs = [epoch for epoch, _ in flat(batches(7, 3, range(14)))]
    assert epochs == sorted(epochs)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_ranks_and_micro_batches_put_together_are_the_global_batch(world_size, accumulate):
    whole = batches(50, 24, range(2, 7))
    parts = [batches(50, 24, range(2, 7), Shard(rank, world_size, accumulate)) for rank in range(world_size)]
    for step, keys in enumerate(whole):
        micro_batches = [
            parts[rank][step * accumulate + micro] for micro in range(accumulate) for rank in range(world_size)
        ]
        assert {len(part) for part in micro_batches} == {24 // world_size // accumulate}
        assert flat(micro_batches) == keys  # in this order, which row_generator counts on


@pytest.mark.parametrize("start", [1, 4, 11, 13])
def test_a_start_anywhere_gives_the_tail_of_the_whole(start):
    assert batches(10, 3, range(start, 14)) == batches(10, 3, range(14))[start:]


def test_the_batch_of_a_step_can_be_asked_for_alone():
    sampler = StepSampler(10, 4, range(6), 0, Shard())
    order = list(sampler)
    assert [sampler.keys(step) for step in (5, 0, 2)] == [order[5], order[0], order[2]]


def test_a_second_pass_over_the_sampler_is_the_first():
    sampler = StepSampler(10, 4, range(6), 0, Shard())
    assert list(sampler) == list(sampler)


def test_every_epoch_and_every_seed_has_its_own_order():
    orders = [tuple(index for _, index in keys) for keys in batches(50, 50, range(5))]
    orders += [tuple(index for _, index in keys) for keys in batches(50, 50, range(5), seed=1)]
    assert len(set(orders)) == 10
    assert tuple(range(50)) not in orders


def test_no_steps_give_no_batches():
    assert batches(10, 4, range(3, 3)) == []

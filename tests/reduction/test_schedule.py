import pytest

from mim.reduction import Counts, KeepRate, PerBlock, RandomScore, ToMe, TopKPruning


def run(schedule, patches, depth):
    counts = []
    for layer in range(depth):
        patches = schedule.left(patches, layer, depth)
        counts.append(patches)
    return counts


def test_keep_rates_round_up_at_a_quarter_a_half_and_three_quarters():
    assert run(KeepRate(0.7), 196, 12) == [196] * 3 + [138] * 3 + [97] * 3 + [68] * 3


def test_a_keep_rate_means_the_decimal_that_was_written():
    for percent in range(1, 101):
        for patches in (1, 7, 100, 196, 577, 1024):
            assert KeepRate(percent / 100, at=[0]).left(patches, 0, 1) == -(-percent * patches // 100)


def test_blocks_can_be_named():
    assert run(KeepRate(0.5, at=[1]), 9, 3) == [9, 5, 5]


def test_a_schedule_may_hold_a_number_per_block():
    assert run(PerBlock(8), 196, 24)[-1] == 196 - 24 * 8
    assert run(PerBlock(8, stop=2), 20, 4) == [12, 4, 4, 4]
    assert run(PerBlock(50), 60, 3) == [10, 1, 1]


def test_numbers_may_rise_or_fall_over_the_depth():
    assert run(PerBlock(4, inflect=1), 30, 5) == [30, 28, 24, 18, 10]
    assert run(PerBlock(4, inflect=-1), 30, 5) == [22, 16, 12, 10, 10]


def test_a_schedule_may_be_any_list_of_counts():
    assert run(Counts([9, 5, 7]), 9, 3) == [9, 5, 5]
    with pytest.raises(ValueError, match="names 3 blocks, the model has 4"):
        Counts([9, 5, 7]).left(9, 0, 4)


@pytest.mark.parametrize("keep", [0, -0.1, 1.1])
def test_rates_outside_0_and_1_are_refused(keep):
    with pytest.raises(ValueError, match="outside"):
        KeepRate(keep)


def test_pairs_take_at_most_every_second_token():
    assert ToMe(PerBlock(100)).counts(9, 4) == [5, 3, 2, 1]


def test_a_schedule_prints_as_the_call_that_builds_it():
    assert repr(PerBlock(8)) == "PerBlock(r=8, inflect=0.0, stop=0)"


def test_half_the_strength_takes_half_as_many():
    reduction = TopKPruning(KeepRate(0.6), RandomScore())
    reduction.strength = 0.5
    assert reduction.counts(100, 4) == [100, 80, 64, 52]
    reduction.strength = 0.0
    assert reduction.counts(100, 4) == [100] * 4


def test_a_reduction_describes_itself_by_the_call_that_builds_it():
    text = TopKPruning(KeepRate(0.6), RandomScore()).describe()
    assert text.startswith("TopKPruning(schedule=KeepRate(keep=0.6, at=None), score=RandomScore(seed=0)")

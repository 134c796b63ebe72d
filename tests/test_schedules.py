import pytest

from mim.schedules import between, cosine, linear, warmup_cosine


def test_linear_is_a_straight_line():
    assert [linear(p, 2.0, 4.0) for p in (0, 0.25, 1)] == [2.0, 2.5, 4.0]


def test_cosine_passes_the_middle_halfway_and_is_flat_at_the_ends():
    assert [cosine(p, 0.996, 1.0) for p in (0, 0.5, 1)] == pytest.approx([0.996, 0.998, 1.0])
    assert cosine(0.1, 0.0, 1.0) < 0.1


def test_learning_rate_starts_at_zero_peaks_after_warmup_and_ends_at_the_minimum():
    steps = (0, 5, 10, 55, 100, 200)
    rates = [warmup_cosine(step, 10, 100, peak=1.0, end=0.1) for step in steps]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1, 0.1])


def test_without_warmup_the_first_step_has_the_peak():
    assert warmup_cosine(0, 0, 100, peak=1.0, end=0.0) == 1.0


def test_a_run_of_nothing_but_warmup_does_not_divide_by_zero():
    assert warmup_cosine(10, 10, 10, peak=1.0, end=0.0) == 1.0


def test_a_way_between_two_points_begins_at_0_and_ends_at_1():
    assert [between(progress, 0.2, 0.6) for progress in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert between(0.0, 0.0, 0.0) == 1

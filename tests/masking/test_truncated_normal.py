import math

import pytest
import torch
from scipy.stats import truncnorm

from mim.masking import TruncatedNormalMasking
from mim.randomness import RowGenerator


@pytest.mark.parametrize(
    ("mean", "low"), [(0.45, 0.4), (0.55, 0.5)]
)  # defaults of the released command line, and of its class
def test_shares_follow_the_cut_normal_distribution_of_scipy(mean, low):
    masking = TruncatedNormalMasking(mean, 0.25, low, 1.0)
    bell = truncnorm((low - mean) / 0.25, (1 - mean) / 0.25, mean, 0.25)
    for number in (0.0, 0.1, 0.5, 0.9, 0.999):
        assert masking.share(number) == pytest.approx(bell.ppf(number), abs=1e-6)


def test_all_images_of_a_step_hide_equally_many_and_steps_differ():
    counts = set()
    for step in range(20):
        hidden = TruncatedNormalMasking()(5, (7, 7), generator=RowGenerator.for_rows(step, 0, 5)).sum(1)
        share = TruncatedNormalMasking().share(*RowGenerator.for_rows(step, 0, 5).common(1))
        assert hidden.tolist() == [math.ceil(49 * share)] * 5
        counts.add(int(hidden[0]))
    assert len(counts) > 8
    assert min(counts) >= 20  # 0.4 of 49


def test_parts_of_a_global_batch_get_the_masks_of_the_whole():
    whole = TruncatedNormalMasking()(6, (4, 4), generator=RowGenerator.for_rows(3, 0, 6))
    part = TruncatedNormalMasking()(2, (4, 4), generator=RowGenerator.for_rows(3, 4, 2))
    assert torch.equal(whole[4:], part)


def test_one_share_for_all_steps_hides_a_known_number():
    masking = TruncatedNormalMasking(low=0.28, high=0.28)
    assert masking.visible_count(25) == 18
    assert masking(3, (5, 5)).sum(1).tolist() == [7] * 3
    assert TruncatedNormalMasking().visible_count(25) is None


@pytest.mark.parametrize("settings", [{"low": 0.0}, {"low": 0.9, "high": 0.8}, {"high": 1.1}, {"std": 0.0}])
def test_shares_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match="need 0 < low <= high <= 1 and std > 0"):
        TruncatedNormalMasking(**settings)

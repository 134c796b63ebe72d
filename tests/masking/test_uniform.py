import pytest
import torch

from mim.errors import UserError
from mim.masking import RandomMasking, VaryingRandomMasking
from mim.randomness import RowGenerator


@pytest.mark.parametrize(
    ("ratio", "grid", "hidden"),
    [
        (0.5, (14, 14), 98),
        (0.6, (14, 14), 118),
        (0.75, (14, 14), 147),
        (0.9, (14, 14), 177),
        (0.5, (16, 16), 128),
        (0.6, (16, 16), 154),
        (0.75, (16, 16), 192),
        (0.9, (16, 16), 231),
        (0.5, (6, 6), 18),
        (0.6, (6, 6), 22),
        (0.75, (6, 6), 27),
        (0.9, (6, 6), 33),
        (0.77, (3, 5), 12),
        (0.0, (3, 5), 0),
    ],
)
def test_every_image_hides_the_count_of_the_reference(ratio, grid, hidden):
    masking = RandomMasking(ratio)
    mask = masking(4, grid)
    assert mask.dtype == torch.bool
    assert masking.visible_count(mask.shape[1]) == mask.shape[1] - hidden
    assert mask.sum(1).tolist() == [hidden] * 4


def test_images_of_a_batch_and_successive_batches_get_other_masks():
    masking = RandomMasking()
    masks = torch.cat([masking(8, (6, 6)), masking(8, (6, 6))])
    assert len(masks.unique(dim=0)) == 16


def test_every_patch_is_hidden_equally_often():
    share = RandomMasking(0.75)(4000, (3, 4)).float().mean(0)
    # Three standard errors of a proportion are 0.02.
    torch.testing.assert_close(share, torch.full((12,), 0.75), atol=0.03, rtol=0)


def test_a_mask_depends_on_its_row_alone():
    rows = RowGenerator.for_rows(seed=7, first=0, count=6)
    part = RowGenerator.for_rows(seed=7, first=2, count=3)
    masking = RandomMasking()
    assert torch.equal(masking(6, (4, 4), generator=rows)[2:5], masking(3, (4, 4), generator=part))


def test_global_seed_repeats_masks():
    masking = RandomMasking()
    torch.manual_seed(3)
    first = masking(2, (4, 4))
    torch.manual_seed(3)
    assert torch.equal(masking(2, (4, 4)), first)


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="outside"):
        RandomMasking(ratio)


def test_hiding_everything_is_refused():
    with pytest.raises(UserError, match="hides all 9 patches"):
        RandomMasking(0.95)(1, (3, 3))


@pytest.mark.parametrize("grid", [(14, 14), (6, 6), (3, 5)])
def test_varying_ratios_hide_whole_counts_of_the_range_or_nothing(grid):
    patches = grid[0] * grid[1]
    masking = VaryingRandomMasking(0.2, 0.6, 0.25)
    counts = masking(4000, grid, generator=RowGenerator.for_rows(0, 0, 4000)).sum(1)
    hiding = counts[counts > 0]
    assert (hiding.min(), hiding.max()) == (int(0.2 * patches), int(0.6 * patches - 1e-9))  # 0.6 itself is never drawn
    assert len(hiding) / 4000 == pytest.approx(0.75, abs=0.03)  # four standard errors


def test_a_fixed_ratio_hides_exactly_its_truncated_count():
    counts = VaryingRandomMasking(0.3, 0.3, 0.0)(64, (14, 14)).sum(1)
    assert counts.tolist() == [58] * 64


def test_varying_masks_depend_on_their_row_alone():
    rows = RowGenerator.for_rows(seed=7, first=0, count=6)
    part = RowGenerator.for_rows(seed=7, first=2, count=3)
    masking = VaryingRandomMasking()
    assert torch.equal(masking(6, (4, 4), generator=rows)[2:5], masking(3, (4, 4), generator=part))

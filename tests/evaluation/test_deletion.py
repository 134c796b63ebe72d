"""The deletion test against a loop over images and patches."""

import pytest
import torch

from mim.evaluation.deletion import SHARES, area, deletion_curve, random_importance


def classify(images):
    """Two classes: whether the upper left quarter is brighter than all else."""
    quarter = images[:, :, :4, :4].sum(dim=(1, 2, 3))
    return torch.stack([quarter, images.sum(dim=(1, 2, 3)) - quarter], dim=1)


@pytest.mark.parametrize("first", [True, False])
def test_a_curve_equals_a_loop_over_images_and_patches(first):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 8, 8, generator=generator)
    importance = torch.randint(4, (5, 4, 4), generator=generator).float()  # with ties
    expected = []
    for share in SHARES:
        kept = 0
        for image, own in zip(images, importance, strict=True):
            order = sorted(range(16), key=lambda patch: -own.flatten()[patch] if first else own.flatten()[patch])
            grey = image.clone()
            for patch in order[: round(share * 16)]:
                row, column = divmod(patch, 4)
                grey[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 0
            kept += int(classify(grey[None]).argmax() == classify(image[None]).argmax())
        expected.append(kept / 5)
    assert deletion_curve(classify, images, importance, first).tolist() == pytest.approx(expected)


def test_deleting_what_the_answer_rests_on_first_changes_it_at_once_and_last_not_before_the_end():
    images = torch.full((3, 1, 8, 8), 0.1)
    images[:, :, :4, :4] = 1.0
    importance = torch.zeros(3, 2, 2)
    importance[:, 0, 0] = 1.0
    shares = (0.25, 0.5, 0.75)
    first = deletion_curve(classify, images, importance, True, shares)
    last = deletion_curve(classify, images, importance, False, shares)
    assert first.tolist() == [0, 0, 0]
    assert last.tolist() == [1, 1, 1]


def test_the_area_is_that_of_trapezoids_from_one():
    assert area(torch.tensor([1.0, 1.0])) == 1
    assert area(torch.tensor([0.5, 0.0])) == pytest.approx((0.75 + 0.25) / 2)


def test_chance_is_the_same_for_an_image_whatever_stands_beside_it():
    assert torch.equal(random_importance(5, (2, 3))[:2], random_importance(2, (2, 3)))

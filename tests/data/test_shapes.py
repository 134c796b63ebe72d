import pickle
from time import process_time

import pytest
import torch

from mim.data.shapes import ShapeSource


def test_image_and_mask_have_the_asked_size() -> None:
    image, mask = ShapeSource("train", 1, size=48).read_pair(0)
    assert image.shape == (3, 48, 48)
    assert mask.shape == (48, 48)
    assert image.dtype == mask.dtype == torch.uint8


def test_an_image_depends_on_seed_split_and_index_alone() -> None:
    source = ShapeSource("train", 20)
    first = source.read(7)
    source.read(3)
    torch.rand(3)
    assert torch.equal(pickle.loads(pickle.dumps(source)).read(7), first)
    assert torch.equal(ShapeSource("train", 8).read(7), first)
    assert not torch.equal(ShapeSource("val", 20).read(7), first)
    assert not torch.equal(ShapeSource("train", 20, seed=1).read(7), first)


def test_shape_classes_are_balanced() -> None:
    source = ShapeSource("val", 100)
    assert source.labels is not None
    assert torch.tensor(source.labels).bincount().tolist() == [10] * 10
    assert source.describe(12) == f"shapes:val/12 ({source.classes[2]})"


@pytest.mark.parametrize("label", range(10))
def test_the_mask_holds_background_and_the_class_of_the_label(label: int) -> None:
    source = ShapeSource("train", 60)
    for index in range(label, 60, 10):
        mask = source.read_pair(index)[1]
        assert mask.flatten().bincount().nonzero().flatten().tolist() == [0, label + 1]
        assert source.mask_classes[label + 1] == source.classes[label]
        assert 0.02 < (mask > 0).float().mean() < 0.66  # a circle of the largest radius and stroke


def test_the_shape_stands_out_from_what_is_around_it() -> None:
    source = ShapeSource("train", 20)
    filled = 0
    for index in range(20):
        image, mask = source.read_pair(index)
        inside, outside = image[:, mask > 0].float().mean(1), image[:, mask == 0].float().mean(1)
        filled += bool(((inside - outside).abs() > 50).all())
    assert 4 <= filled <= 16  # filled shapes differ in every channel; outlined ones mostly show the background


def test_colour_does_not_name_the_shape() -> None:
    source = ShapeSource("train", 300)
    colours = torch.stack([source.read(i).float().mean((1, 2)) for i in range(300)])
    distance = torch.cdist(colours, colours).fill_diagonal_(torch.inf)
    labels = torch.tensor(source.labels)
    assert (labels[distance.argmin(1)] == labels).float().mean() < 0.2  # chance is 0.1


def test_an_image_takes_about_a_millisecond() -> None:
    source = ShapeSource("train")
    source.read(0)
    start = process_time()
    for index in range(50):
        source.read(index)
    assert (process_time() - start) / 50 < 0.01  # ten times the cost measured on a quiet core

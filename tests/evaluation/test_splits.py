import pytest
import torch

from mim.evaluation import stratified_split


def test_every_class_gives_the_same_share():
    labels = torch.arange(100) % 4
    kept, held = stratified_split(labels, 0.2, 0)
    assert labels[held].bincount().tolist() == [5, 5, 5, 5]
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(100))


def test_rows_depend_on_the_key_alone():
    labels = torch.arange(100) % 4
    first = stratified_split(labels, 0.2, 3, "a")[1]
    torch.rand(5)
    assert stratified_split(labels, 0.2, 3, "a")[1].equal(first)
    assert not stratified_split(labels, 0.2, 4, "a")[1].equal(first)


def test_small_classes_keep_one_image_and_give_one_if_they_can():
    kept, held = stratified_split(torch.tensor([0, 2, 2, 4, 4, 4]), 0.1, 0)  # classes 1 and 3 are empty
    labels = torch.tensor([0, 2, 2, 4, 4, 4])
    assert labels[held].tolist() == [2, 4]
    assert labels[kept].tolist() == [0, 2, 4, 4]


def test_one_image_per_class_is_refused():
    with pytest.raises(ValueError, match="nothing to hold out"):
        stratified_split(torch.arange(5), 0.2, 0)

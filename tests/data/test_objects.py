"""Data sets of Python as sources: what their items may be, where labels come from, and what is said of mistakes."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from mim.data.images import ImageError
from mim.data.labelled import fingerprint, open_labelled
from mim.data.objects import ObjectSource, handed_over, is_object, open_object, short_name
from mim.errors import UserError

GREY = np.arange(20, dtype=np.uint8).reshape(4, 5)
COLOUR = np.stack([GREY, GREY + 1, GREY + 2], axis=-1)  # (4, 5, 3)


class Pictures(Dataset):
    """Of any items, with or without labels."""

    def __init__(self, items, **attributes):
        self.items = items
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def opened(data, channels=3):
    with handed_over(data) as name:
        return open_object(name, channels)[0]


COLOUR_ITEMS = {
    "PIL": Image.fromarray(COLOUR),
    "tensor": torch.from_numpy(COLOUR).permute(2, 0, 1),
    "array": COLOUR,
    "tuple": (Image.fromarray(COLOUR), 3),
    "list": [Image.fromarray(COLOUR), "label"],
    "mapping": {"label": 3, "image": COLOUR},
}


@pytest.mark.parametrize("item", COLOUR_ITEMS.values(), ids=COLOUR_ITEMS.keys())
def test_an_item_of_each_kind_gives_its_pixels(item):
    assert opened(Pictures([item])).read(0).permute(1, 2, 0).tolist() == COLOUR.tolist()


@pytest.mark.parametrize("item", [Image.fromarray(GREY), torch.from_numpy(GREY), torch.from_numpy(GREY)[None], GREY])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_stand_in_for_each_other(item, channels):
    pixels = opened(Pictures([item]), channels).read(0)
    assert pixels.tolist() == [GREY.tolist()] * channels
    assert opened(Pictures([COLOUR]), 1).read(0).shape == (1, 4, 5)


def test_many_channels_must_be_met_exactly():
    pixels = torch.randint(256, (5, 6, 7), dtype=torch.uint8)
    assert torch.equal(opened(Pictures([pixels]), 5).read(0), pixels)
    with pytest.raises(ImageError, match="where 4 channels are expected"):
        opened(Pictures([pixels]), 4).read(0)
    with pytest.raises(ImageError, match="where 3 channels are expected"):
        opened(Pictures([pixels]), 3).read(0)


def test_a_path_is_read_like_a_file(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    source = opened([str(tmp_path / "a.png"), tmp_path / "b.png"])
    assert source.read(0).permute(1, 2, 0).tolist() == COLOUR.tolist()
    with pytest.raises(ImageError, match="empty file"):
        source.read(1)


def test_pixels_share_no_memory_with_the_item():
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    opened(Pictures([pixels])).read(0).fill_(7)
    assert pixels.sum() == 0


@pytest.mark.parametrize(
    ("item", "error"),
    [
        (torch.zeros(3, 4, 4), "an item is of float32, not of uint8"),
        (np.zeros((4, 4, 3)), "an item is of float64, not of uint8"),
        (3, "an item is a int, not a picture"),
        ({"x": 3}, "an item has x, none of image, img"),
    ],
)
def test_a_data_set_of_something_else_is_refused_once(item, error):
    with pytest.raises(UserError) as refused:
        opened(Pictures([item]))
    assert error in refused.value.error
    assert "without a transform" in refused.value.hint


def test_whatever_an_item_raises_is_the_reason_why_it_is_unreadable():
    source = opened(Pictures([COLOUR, OSError("disk is gone"), torch.zeros(3, 4, 4)]))
    for index, reason in ((1, "OSError: disk is gone"), (2, "NoPictureError: an item is of float32, not of uint8")):
        with pytest.raises(ImageError) as error:
            source.read(index)
        assert (error.value.path, error.value.reason) == (f"Pictures[{index}]", reason)


class Drawing(Pictures):
    """Draws its pixels from all global generators."""

    def __getitem__(self, index):
        return torch.tensor([[[random.randrange(256), np.random.randint(256), int(torch.randint(256, ()))]]] * 3).byte()  # noqa: NPY002


def test_random_numbers_of_an_item_are_a_function_of_its_index():
    source = opened(Drawing([0, 0]))
    before = random.getstate(), torch.get_rng_state().tolist()
    first = source.read(0)
    assert (random.getstate(), torch.get_rng_state().tolist()) == before
    random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(source.read(0), first)
    assert not torch.equal(source.read(1), first)


# Labels --------------------------------------------------------------------------------------------------------------

LABELLED = {
    "targets": (Pictures([COLOUR] * 3, targets=[2, 0, 2]), [1, 0, 1], ["0", "2"]),
    "targets as tensor": (Pictures([COLOUR] * 3, targets=torch.tensor([1, 0, 1])), [1, 0, 1], ["0", "1"]),
    "targets as array": (Pictures([COLOUR] * 3, targets=np.array([1, 0, 1])), [1, 0, 1], ["0", "1"]),
    "labels": (Pictures([COLOUR] * 3, labels=["b", "a", "b"]), [1, 0, 1], ["a", "b"]),
    "named": (Pictures([COLOUR] * 3, targets=[2, 0, 2], classes=["x", "y", "z"]), [2, 0, 2], ["x", "y", "z"]),
    "tensors": (
        TensorDataset(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.tensor([1, 0, 1])),
        [1, 0, 1],
        ["0", "1"],
    ),
    "subset": (Subset(Pictures([COLOUR] * 3, targets=[2, 0, 1], classes=list("xyz")), [2, 0]), [1, 2], list("xyz")),
    "joined": (ConcatDataset([Pictures([COLOUR], targets=[4]), Pictures([COLOUR], targets=[3])]), [1, 0], ["3", "4"]),
}


@pytest.mark.parametrize(("data", "labels", "classes"), LABELLED.values(), ids=LABELLED.keys())
def test_labels_are_found_beside_the_items(data, labels, classes):
    source = opened(data)
    assert (source.labels, source.classes) == (labels, classes)


UNLABELLED = {
    "none": Pictures([COLOUR] * 3),
    "negative": Pictures([COLOUR] * 3, targets=[-1, 0, 1]),
    "fractions": Pictures([COLOUR] * 3, targets=[0.5, 0.1, 0.2]),
    "a method": Pictures([COLOUR] * 3, labels=lambda: [0, 1, 1]),
    "fractions as tensor": TensorDataset(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.rand(3)),
    "joined in part": ConcatDataset([Pictures([COLOUR], targets=[4]), Pictures([COLOUR])]),
}


@pytest.mark.parametrize("data", UNLABELLED.values(), ids=UNLABELLED.keys())
def test_what_is_no_class_for_each_item_is_no_label(data):
    source = opened(data)
    assert (source.labels, source.classes) == (None, [])


def test_labels_that_only_come_with_the_images_are_reported_as_ignored():
    assert opened(Pictures([COLOUR] * 3)).ignored == {}
    ((what, count),) = opened(Pictures([(COLOUR, 1)] * 3)).ignored.items()
    assert count == 3
    assert "no `targets`" in what


def test_too_few_labels_are_refused():
    with pytest.raises(UserError, match="2 labels for 3 images"):
        opened(Pictures([COLOUR] * 3, targets=[0, 1]))


def test_an_evaluation_needs_labels():
    with handed_over(Pictures([COLOUR] * 3)) as name, pytest.raises(UserError) as error:
        open_labelled(name)
    assert error.value.hint == "set dataset.targets"
    with handed_over(Pictures([COLOUR] * 3, targets=[0, 1, 1])) as name:
        assert open_labelled(name).classes == ["0", "1"]


def test_features_of_an_object_are_never_taken_from_an_earlier_one():
    """Two data sets of one class and length may hold other images, and no file tells."""
    sources = [opened(Pictures([COLOUR])) for _ in range(2)]
    assert fingerprint(sources[0]) != fingerprint(sources[1])


# Names ---------------------------------------------------------------------------------------------------------------


def test_a_name_tells_class_and_length_and_is_good_for_as_long_as_the_object_is_handed_over():
    with handed_over(Pictures([COLOUR] * 3)) as name:
        assert name == f"python:{__name__}.Pictures[3]"
        assert is_object(name)
        assert short_name(name) == "Pictures"
    with pytest.raises(UserError) as error:
        open_object(name, 3)
    assert error.value.error == f"--data {name} is an object of Python, which is not at hand"


def test_a_text_or_path_is_handed_on(tmp_path):
    for given in (str(tmp_path), tmp_path):
        with handed_over(given) as name:
            assert name == str(tmp_path)
            assert not is_object(name)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    "data", [3, None, Stream(), iter([]), {"a": 1}, Dataset()], ids=lambda data: type(data).__name__
)
def test_what_has_no_length_or_order_is_refused(data):
    with pytest.raises(UserError, match="is not a data set"), handed_over(data):
        pass


def test_an_empty_data_set_is_refused():
    with pytest.raises(UserError, match="is empty"), handed_over([]):
        pass


def test_a_source_is_sent_to_loader_processes():
    import pickle

    source = pickle.loads(pickle.dumps(ObjectSource([COLOUR], "list", 3)))
    assert source.read(0).shape == (3, 4, 5)


# Hugging Face --------------------------------------------------------------------------------------------------------


@pytest.fixture
def flowers(tmp_path):
    """A data set as ``load_from_disk`` gives it: two splits, one unreadable image, one missing."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "where": datasets.Value("string"),
            "photo": datasets.Image(),
            "kind": datasets.ClassLabel(names=["rose", "tulip"]),
        }
    )

    def split(count):
        photos = [Image.fromarray(COLOUR + number) for number in range(count)]
        rows = {"where": ["x"] * count, "photo": photos, "kind": [number % 2 for number in range(count)]}
        return datasets.Dataset.from_dict(rows, features=features)

    broken = {"where": ["x", "x"], "photo": [{"bytes": b"no image", "path": None}, None], "kind": [0, 1]}
    train = datasets.concatenate_datasets([split(3), datasets.Dataset.from_dict(broken, features=features)])
    datasets.DatasetDict({"train": train, "test": split(2)}).save_to_disk(tmp_path / "flowers")
    return datasets.load_from_disk(tmp_path / "flowers")


def test_a_hugging_face_data_set_gives_pixels_labels_and_names(flowers):
    source = opened(flowers["train"])
    assert [source.read(index)[0, 0, 0].item() for index in range(3)] == [0, 1, 2]
    assert (source.labels, source.classes) == ([0, 1, 0, 0, 1], ["rose", "tulip"])


@pytest.mark.parametrize(
    ("index", "reason"), [(3, "damaged, or not of a readable format"), (4, "no image in this row")]
)
def test_its_unreadable_images_have_our_readers_reasons(flowers, index, reason):
    with pytest.raises(ImageError) as error:
        opened(flowers["train"]).read(index)
    assert error.value.path == f"Dataset[{index}]"
    assert reason in error.value.reason


def test_its_splits_are_images_to_train_on_and_apart(flowers):
    with handed_over(flowers) as name:
        train, held_out = open_object(name, 3)
        assert name == "python:datasets.dataset_dict.DatasetDict[train=5,test=2]"
    assert (len(train), len(held_out)) == (5, 2)


def test_its_format_does_not_matter_and_a_transform_is_refused(flowers):
    assert opened(flowers["train"].with_format("torch")).read(2)[0, 0, 0] == 2
    with pytest.raises(UserError, match="has a transform, which would not be applied"):
        opened(flowers["train"].with_transform(lambda rows: rows))


def test_a_table_without_images_is_refused_by_its_columns(flowers):
    with pytest.raises(UserError) as error:
        opened(flowers["train"].remove_columns("photo"))
    assert error.value.why == "its columns are where (Value), kind (ClassLabel)"


def test_splits_without_train_are_refused(flowers):
    del flowers["train"]
    with pytest.raises(UserError, match="none of them train"):
        opened(flowers)

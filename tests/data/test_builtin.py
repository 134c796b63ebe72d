import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mim.data import builtin
from mim.data.builtin import MosaicSource, Photo, PhotoSource, Split

PHOTOS = Path(builtin.__file__).parent / "photos"


def test_a_window_has_the_asked_size() -> None:
    image = PhotoSource("train", 1, size=40).read(0)
    assert image.shape == (3, 40, 40)
    assert image.dtype == torch.uint8


def test_a_window_depends_on_split_and_index_alone() -> None:
    source = PhotoSource("train", 30, size=32)
    first = source.read(17)
    source.read(4)
    torch.rand(3)
    assert torch.equal(pickle.loads(pickle.dumps(source)).read(17), first)
    assert torch.equal(PhotoSource("train", 18, size=32).read(17), first)


def test_windows_of_one_photo_differ() -> None:
    source = PhotoSource("train", 30, size=32)
    assert source.labels is not None
    assert source.labels[0] == source.labels[13]
    assert not torch.equal(source.read(0), source.read(13))


def test_photo_classes_are_balanced_and_named_after_the_files() -> None:
    source = PhotoSource("test", 130)
    assert source.labels is not None
    assert torch.tensor(source.labels).bincount().tolist() == [10] * len(source.classes)
    assert [f"{name}.jpg" for name in source.classes] == sorted(path.name for path in PHOTOS.glob("*.jpg"))
    assert "cat.jpg" in source.describe(source.classes.index("cat"))


@pytest.mark.parametrize("photo", PhotoSource("train").classes)
def test_no_jpeg_block_is_seen_by_both_splits(photo: Photo) -> None:
    with Image.open(PHOTOS / f"{photo}.jpg") as file:
        width = file.width
    train, test = builtin._region(photo, "train"), builtin._region(photo, "test")
    assert train.width + test.width + 16 <= width  # 16 pixels: the widest block of a JPEG with halved colours


def test_windows_fit_into_every_region() -> None:
    regions = [builtin._region(photo, "test") for photo in PhotoSource("test").classes]
    assert min(min(region.size) for region in regions) >= builtin._WINDOW[1]


def test_mean_colour_does_not_name_the_photo() -> None:
    train, test = PhotoSource("train", 260, size=32), PhotoSource("test", 130, size=32)
    distance = torch.cdist(_mean_colours(train), _mean_colours(test))
    nearest = distance.argmin(0)
    assert train.labels is not None
    assert test.labels is not None
    hits = [train.labels[i] == label for i, label in zip(nearest.tolist(), test.labels, strict=True)]
    assert sum(hits) / len(hits) < 0.45  # 0.65 before exposure and tint were drawn at random


def _mean_colours(source: PhotoSource) -> Tensor:
    return torch.stack([source.read(i).float().mean((1, 2)) for i in range(len(source))])


def test_every_photo_has_a_licence_line_and_all_are_small() -> None:
    files = list(PHOTOS.glob("*.jpg"))
    rows = [line for line in (PHOTOS / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(path.name for path in files)
    assert sum(path.stat().st_size for path in files) < 1_500_000


def test_a_mosaic_has_a_class_for_every_pixel_and_several_classes() -> None:
    source = MosaicSource("train", 8, size=48)
    for index in range(len(source)):
        image, mask = source.read_pair(index)
        assert image.shape == (3, 48, 48)
        assert mask.shape == (48, 48)
        assert image.dtype == mask.dtype == torch.uint8
        assert int(mask.max()) < len(source.mask_classes)
        assert len(mask.flatten().bincount().nonzero().flatten()) >= 2
        assert torch.equal(source.read(index), image)


def test_mosaic_pixels_come_from_the_texture_that_the_mask_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(photo: Photo, split: Split, size: int, generator: torch.Generator) -> Tensor:
        return torch.full((3, size, size), builtin._TEXTURES.index(photo), dtype=torch.uint8)

    monkeypatch.setattr(builtin, "_window", flat)
    image, mask = MosaicSource("train", 4, size=24).read_pair(3)
    assert torch.equal(image, mask.expand(3, -1, -1))


def test_mosaics_of_the_two_splits_differ() -> None:
    assert not torch.equal(MosaicSource("train", 1).read_pair(0)[1], MosaicSource("test", 1).read_pair(0)[1])

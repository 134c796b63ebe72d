from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from mim.commands import make_shapes
from mim.data.shapes import ShapeSource
from mim.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_shapes.run(tmp_path / "shapes", train=20, val=10, size=32)
    return tmp_path / "shapes"


def test_images_form_an_ordinary_folder_of_classes(folder: Path) -> None:
    images = ImageFolder(folder / "train" / "images")
    assert images.classes == ShapeSource("train").classes
    assert [label for _, label in images.samples] == [label for label in range(10) for _ in range(2)]
    assert len(ImageFolder(folder / "val" / "images")) == 10


def test_files_hold_exactly_what_the_source_gives(folder: Path) -> None:
    image, mask = ShapeSource("train", 20, size=32).read_pair(11)
    name = f"{ShapeSource('train').classes[1]}/00011.png"
    written = np.array(Image.open(folder / "train" / "images" / name))
    assert torch.equal(torch.from_numpy(written).permute(2, 0, 1), image)
    assert torch.equal(torch.from_numpy(np.array(Image.open(folder / "train" / "masks" / name))), mask)


def test_every_image_has_a_mask_of_one_byte_per_pixel(folder: Path) -> None:
    images = sorted(path.relative_to(folder / "val/images") for path in (folder / "val/images").rglob("*.png"))
    masks = sorted(path.relative_to(folder / "val/masks") for path in (folder / "val/masks").rglob("*.png"))
    assert images == masks
    assert {Image.open(folder / "val/masks" / path).mode for path in masks} == {"L"}


def test_mask_values_are_named(folder: Path) -> None:
    lines = (folder / "mask_classes.txt").read_text().splitlines()
    assert lines[:2] == ["0 background", "1 arrow"]
    assert len(lines) == 11


def test_a_folder_in_use_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="not empty"):
        make_shapes.run(folder)

"""Every layout of images with masks, and every way in which a mask can be wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mim.data.mask_classes import IGNORE, ClassNumbers, ranges, read_classes
from mim.data.masks import open_masks
from mim.data.segmentation import JointCrop, SegmentationData
from mim.errors import UserError

VALUES = np.array([[0, 1, 2], [2, 1, 255]], dtype=np.uint8)


def write(image: Path, mask: Path, values=VALUES, mode="L", scale=8):
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    values = np.kron(values, np.ones((scale, scale), dtype=values.dtype))
    Image.fromarray(np.stack([values.astype(np.uint8) * 50] * 3, 2)).save(image)
    picture = Image.fromarray(values)
    if mode == "P":
        picture = picture.convert("P") if picture.mode != "L" else picture
        picture.putpalette([value for number in range(256) for value in (255 - number, number, 7)])
    picture.save(mask)


def plain(root, parts=("train", "val"), count=2, **kwargs):
    for part in parts:
        for number in range(count):
            write(root / part / "images" / f"{number}.jpg", root / part / "masks" / f"{number}.png", **kwargs)
    return root


def opened(root, **kwargs):
    data = SegmentationData(str(root), crop=16, **kwargs)
    data.open([0.5] * 3, [0.25] * 3)
    return data


def test_folders_of_images_and_masks(tmp_path):
    data = opened(plain(tmp_path))
    _, classes = data.pair(data.train, 0)
    assert (len(data.train), len(data.test), data.numbers.count) == (2, 2, 3)
    assert classes[::8, ::8].tolist() == [[0, 1, 2], [2, 1, IGNORE]]


def test_another_part_can_be_scored(tmp_path):
    data = opened(plain(tmp_path, ("train", "val", "test")), split="test")
    assert "test" in data.test.describe(0)


def test_palette_masks_keep_their_numbers(tmp_path):
    data = opened(plain(tmp_path, mode="P"))
    assert data.pair(data.train, 1)[1][::8, ::8].tolist() == [[0, 1, 2], [2, 1, IGNORE]]


def test_grey_masks_saved_as_colours_are_read(tmp_path):
    plain(tmp_path)
    for mask in tmp_path.rglob("masks/*.png"):
        Image.open(mask).convert("RGB").save(mask)
    assert opened(tmp_path).numbers.count == 3


def test_ade20k_counts_from_one_and_zero_is_not_scored(tmp_path):
    for part in ("training", "validation"):
        write(tmp_path / "images" / part / "a.jpg", tmp_path / "annotations" / part / "a.png")
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.2\twall\n2\t0.1\tbuilding, edifice\n")
    data = opened(tmp_path)
    assert data.names == ["wall", "building, edifice"]
    assert data.pair(data.test, 0)[1][::8, ::8].tolist() == [[IGNORE, 0, 1], [1, 0, IGNORE]]


def test_pascal_voc_lists_name_the_parts(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / "JPEGImages" / f"{name}.jpg", tmp_path / "SegmentationClass" / f"{name}.png", mode="P")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nc\n")
    (lists / "val.txt").write_text("b\n")
    data = opened(tmp_path)
    assert [len(data.train), len(data.test)] == [2, 1]
    assert data.train.describe(1).endswith("c.png")
    (lists / "val.txt").unlink()
    with pytest.raises(UserError, match="no such list"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["builtin", "shapes"])
def test_built_in_sets_name_their_classes(name):
    found = open_masks(name)
    _, mask = found.train.read_pair(0)
    assert set(torch.unique(mask).tolist()) <= set(found.names)


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        ("sky\nroad\n", {0: "sky", 1: "road"}),
        ("0 sky\n3 wet road\n", {0: "sky", 3: "wet road"}),
    ],
)
def test_names_come_from_lines_or_numbered_lines(tmp_path, lines, names):
    (tmp_path / "classes.txt").write_text(lines)
    assert read_classes(tmp_path / "classes.txt") == (names, None)


COLOURS = "\n".join(["0 0 0 void", "128 64 128 wet road", "0 0 255\tsky"])


@pytest.mark.parametrize("lines", [COLOURS, "name,r,g,b\nvoid,0,0,0\nwet road,128,64,128\nsky, 0, 0, 255"])
def test_colours_stand_before_or_behind_names(tmp_path, lines):
    (tmp_path / "classes.txt").write_text(lines)
    names, colours = read_classes(tmp_path / "classes.txt")
    assert names == {0: "void", 1: "wet road", 2: "sky"}
    assert colours == [(0, 0, 0), (128, 64, 128), (0, 0, 255)]


@pytest.mark.parametrize("line", ["0 0 300 sky", "128 64 128 sky"])
def test_a_colour_is_a_colour_and_belongs_to_one_class(tmp_path, line):
    (tmp_path / "classes.txt").write_text(f"128 64 128 road\n{line}\n")
    with pytest.raises(UserError, match="sky has the colour"):
        read_classes(tmp_path / "classes.txt")


def coloured(root):
    """Masks of the three colours, as RGB and as palette PNG."""
    (root / "classes.txt").write_text(COLOURS)
    table = np.array([[0, 0, 0], [128, 64, 128], [0, 0, 255]], dtype=np.uint8)
    plain(root, values=VALUES % 3)
    for number, mask in enumerate(sorted(root.rglob("masks/*.png"))):
        picture = Image.fromarray(table[np.asarray(Image.open(mask))])
        (picture.quantize() if number % 2 else picture).save(mask)
    return root


def test_masks_in_colours_are_read_by_the_classes_file(tmp_path):
    data = opened(coloured(tmp_path), ignore=(0, 255))
    assert data.names == ["void", "wet road", "sky"]
    for index in range(2):
        assert data.pair(data.train, index)[1][::8, ::8].tolist() == [[IGNORE, 1, 2], [2, 1, IGNORE]]


def test_a_colour_without_a_class_is_named(tmp_path):
    mask = coloured(tmp_path) / "val" / "masks" / "1.png"
    picture = Image.open(mask).convert("RGB")
    picture.putpixel((5, 7), (1, 2, 3))
    picture.save(mask)
    with pytest.raises(UserError, match="has the colour 1 2 3 at column 5, row 7: no class") as caught:
        opened(tmp_path)
    assert "1 of its 384 pixels" in caught.value.why
    assert "a line  1 2 3 name" in caught.value.hint


def test_a_value_beyond_the_classes_says_what_is_allowed(tmp_path):
    with pytest.raises(UserError) as caught:
        opened(plain(tmp_path), num_classes=2)
    text = str(caught.value)
    assert "holds value 2, but --num_classes 2 allows 0..1" in text
    assert "values found: 0-2, 255 (ignored)" in text
    assert "--num_classes 3    or    --ignore 2,255" in text


def test_an_ignored_value_is_not_scored(tmp_path):
    data = opened(plain(tmp_path), ignore=(2, 255))
    assert data.numbers.count == 2
    assert data.pair(data.train, 0)[1][::8, ::8].tolist() == [[0, 1, IGNORE], [IGNORE, 1, IGNORE]]


def test_a_missing_mask_is_named(tmp_path):
    plain(tmp_path)
    (tmp_path / "val/masks/1.png").unlink()
    with pytest.raises(UserError, match="1 of 2 images have no mask"):
        opened(tmp_path)


def test_a_mask_of_another_size_is_refused(tmp_path):
    plain(tmp_path)
    Image.new("L", (24, 15)).save(tmp_path / "val/masks/1.png")
    with pytest.raises(UserError, match="has 24x15 pixels, its image 24x16"):
        opened(tmp_path)


def test_colour_masks_are_refused(tmp_path):
    plain(tmp_path)
    Image.new("RGB", (24, 16), "red").save(tmp_path / "train/masks/0.png")
    with pytest.raises(UserError) as caught:
        opened(tmp_path)
    assert "holds colours" in str(caught.value)
    assert "--classes FILE   with lines  128 64 128 road" in str(caught.value)


def test_jpeg_masks_are_refused(tmp_path):
    plain(tmp_path)
    mask = tmp_path / "train/masks/0.png"
    Image.open(mask).save(mask.with_suffix(".jpg"))
    mask.unlink()
    with pytest.raises(UserError, match="cannot be used") as caught:
        opened(tmp_path)
    assert "a JPEG changes numbers" in str(caught.value)


def test_black_and_white_masks_are_refused(tmp_path):
    with pytest.raises(UserError, match="fewer than two classes"):
        opened(plain(tmp_path, values=np.array([[0, 255]], dtype=np.uint8)))


def test_grey_levels_are_not_class_numbers(tmp_path):
    with pytest.raises(UserError, match="do not hold class numbers"):
        opened(plain(tmp_path, values=np.array([[0, 128, 250]], dtype=np.uint8)))


def test_a_folder_of_no_known_layout_says_what_it_found(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError) as caught:
        opened(tmp_path)
    assert "found pictures/" in str(caught.value)


def test_sixteen_bit_masks_are_read(tmp_path):
    data = opened(plain(tmp_path, values=VALUES.astype(np.uint16)))
    assert data.numbers.count == 3


def test_ranges_are_short():
    assert ranges([0, 1, 2, 5, 255], [255]) == "0-2, 5, 255 (ignored)"


def test_zero_is_other_shifts_the_classes():
    classes = ClassNumbers(2, (255,), zero_is_other=True)(torch.tensor([[0, 1, 2, 255]]), "mask")
    assert classes.tolist() == [[IGNORE, 0, 1, IGNORE]]


def test_image_and_classes_are_cut_alike():
    torch.manual_seed(0)
    classes = torch.randint(0, 2, (4, 6)).repeat_interleave(20, 0).repeat_interleave(20, 1).to(torch.int16)
    image = (classes * 200).to(torch.uint8)[None].repeat(2, 1, 1)  # two channels: no photometric changes
    crop = JointCrop(32, (1.0, 2.0), fill=[0, 0])
    for _ in range(5):
        pixels, cut = crop(image, classes)
        assert pixels.shape == (2, 32, 32)
        assert ((pixels[0] > 100) == cut).float().mean() > 0.95  # a border may fall on either side of a pixel's centre


def test_a_small_image_is_filled_with_ignored_pixels():
    torch.manual_seed(0)
    pixels, cut = JointCrop(32, (0.5, 0.5), fill=[9, 9, 9])(
        torch.zeros(3, 20, 20, dtype=torch.uint8), torch.zeros(20, 20, dtype=torch.int16)
    )
    assert (cut == IGNORE).float().mean() == 0.75
    assert (pixels[:, cut == IGNORE] == 9).all()


def test_a_crop_depends_on_seed_and_place_alone(tmp_path):
    data = opened(plain(tmp_path))
    from mim.data.segmentation import _Crops

    first, again, other = (_Crops(data)[key] for key in ((0, 1), (0, 1), (1, 1)))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_shares_of_the_scored_images_are_disjoint_and_whole(tmp_path):
    data = opened(plain(tmp_path, count=5))
    shares = []
    for rank in range(2):
        data.trainer = type("T", (), {"global_rank": rank, "world_size": 2})()
        shares += list(data.val_dataloader().sampler)
    assert sorted(shares) == [0, 1, 2, 3, 4]

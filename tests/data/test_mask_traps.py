"""Masks as people have them: every layout is paired right, and numbers that are no classes are refused by name."""

import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mim.data.mask_classes import IGNORE, ClassNumbers, refuse_smoothed
from mim.data.mask_pairs import CITYSCAPES, find_pairs
from mim.data.segmentation import SegmentationData
from mim.data.sources import open_source
from mim.errors import UserError
from mim.options.segmentation import Scoring, SegmentationOptions, SegmentationRecipe, check

VALUES = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)


def write(path, values, scale=8, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.asarray(values, dtype=np.uint8)
    Image.fromarray(np.kron(values, np.ones((scale, scale), np.uint8))).save(path, **options)


def pair(root, photo, mask, values=VALUES, **options):
    write(root / photo, values, **options)
    write(root / mask, values)


def opened(root, **options):
    data = SegmentationData(str(root), crop=16, **options)
    data.open([0.5] * 3, [0.25] * 3)
    return data


LAYOUTS = {
    "train/images": ("{part}/images/{n}.jpg", "{part}/masks/{n}.png", ("train", "val")),
    "Train/Images": ("{part}/Images/{n}.jpg", "{part}/Labels/{n}.png", ("Training", "Testing")),
    "images/train": ("images/{part}/{n}.jpg", "masks/{part}/{n}.png", ("train", "val")),
    "images/train, annotations": ("images/{part}/{n}.jpg", "annotations/{part}/{n}.png", ("train", "val")),
    "train_images": ("{part}_images/{n}.jpg", "{part}_masks/{n}.png", ("train", "test")),
    "CamVid": ("{part}/{n}.png", "{part}annot/{n}.png", ("train", "val")),
    "below": ("data/set/{part}/images/{n}.jpg", "data/set/{part}/masks/{n}_mask.png", ("train", "val")),
}


@pytest.mark.parametrize(("photo", "mask", "parts"), LAYOUTS.values(), ids=LAYOUTS)
def test_each_layout_is_read_and_pretraining_takes_its_photos_alone(tmp_path, photo, mask, parts):
    for part in parts:
        for n in range(2):
            pair(tmp_path, photo.format(part=part, n=n), mask.format(part=part, n=n))
    data = opened(tmp_path)
    assert (len(data.train), len(data.test), data.numbers.count) == (2, 2, 3)
    assert data.pair(data.train, 1)[1][::8, ::8].tolist() == VALUES.tolist()
    photos = [source.describe(n) for source in open_source(str(tmp_path)) for n in range(2)]
    assert photos == [str(image) for part in (data.train, data.test) for image, _ in part.pairs]


@pytest.mark.parametrize(("photo", "mask"), [("images", "masks"), ("imgs", "labels"), ("Images", "GT")])
def test_images_beside_masks_without_parts_hold_a_share_out_by_a_key(tmp_path, photo, mask):
    for n in range(10):
        pair(tmp_path, f"{photo}/{n}.jpg", f"{mask}/{n}.png")
    data, again = opened(tmp_path), opened(tmp_path, val_fraction=0.5)
    assert (len(data.train), len(data.test), len(again.test)) == (8, 2, 5)
    assert not set(data.train.pairs) & set(data.test.pairs)
    assert opened(tmp_path).test.pairs == data.test.pairs


def cvat(root, lists=("default",), images=True):
    table = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], dtype=np.uint8)
    (root / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nwet road:128,0,0::\nsky:0,128,0::\n"
    )
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for number, name in enumerate(lists):
        stems = [f"{name}{n}" for n in range(5)]
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            write(root / "SegmentationClass" / f"{stem}.png", VALUES)
            big = np.kron(VALUES, np.ones((8, 8), np.uint8))
            Image.fromarray(table[big]).save(root / "SegmentationClass" / f"{stem}.png")
            write(root / "SegmentationObject" / f"{stem}.png", VALUES)
            if images:
                write(root / "JPEGImages" / f"{stem}.jpg", VALUES + number)
    return root


@pytest.mark.parametrize("lists", [("default",), ("Train", "Validation")])
def test_an_export_of_cvat_is_read_with_its_names(tmp_path, lists):
    data = opened(cvat(tmp_path, lists))
    assert (len(data.train), len(data.test)) == ((4, 1) if len(lists) == 1 else (5, 5))
    assert data.names == ["background", "wet road", "sky"]
    assert data.pair(data.train, 0)[1][::8, ::8].tolist() == VALUES.tolist()


def test_an_export_of_cvat_without_images_says_so(tmp_path):
    with pytest.raises(UserError, match="has masks but no JPEGImages/"):
        opened(cvat(tmp_path, images=False))


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes_scores_its_nineteen_classes(tmp_path, kind):
    ids = [*CITYSCAPES] if kind == "labelIds" else range(19)
    values = np.array([[*ids, 255 if kind == "labelTrainIds" else 3]], dtype=np.uint8)
    for part, city in (("train", "aachen"), ("val", "ulm")):
        write(tmp_path / f"leftImg8bit/{part}/{city}/{city}_1_leftImg8bit.png", values)
        write(tmp_path / f"gtFine/{part}/{city}/{city}_1_gtFine_{kind}.png", values)
        write(tmp_path / f"gtFine/{part}/{city}/{city}_1_gtFine_color.png", values)
    data = opened(tmp_path)
    assert (data.numbers.count, data.names[0], data.names[18]) == (19, "road", "bicycle")
    assert data.pair(data.test, 0)[1][0, ::8].tolist() == [*range(19), IGNORE]


def test_only_ade20k_counts_from_one(tmp_path):
    for part in ("training", "validation"):
        pair(tmp_path, f"images/{part}/1.jpg", f"annotations/{part}/1.png")
    assert opened(tmp_path).numbers.zero_is_other


def test_two_masks_of_an_image_are_refused(tmp_path):
    for name in ("1.png", "1_mask.png", "1.tif"):
        pair(tmp_path, "images/1.jpg", f"masks/{name}")
    with pytest.raises(UserError, match="stand for the same image"):
        find_pairs(tmp_path, None, 0.2)


def simple(root, values=VALUES, count=2):
    for part in ("train", "val"):
        for n in range(count):
            pair(root, f"{part}/images/{n}.jpg", f"{part}/masks/{n}.png", values)
    return root


BLACK_AND_WHITE = np.array([[0, 255], [255, 0]])


@pytest.mark.parametrize("options", [{}, {"num_classes": 2}, {"names": "background\nobject\n"}])
def test_black_and_white_masks_name_the_way_to_read_them(tmp_path, options):
    root = simple(tmp_path, BLACK_AND_WHITE)
    if names := options.pop("names", None):
        (root / "classes.txt").write_text(names)
    with pytest.raises(UserError) as refused:
        opened(root, **options)
    assert refused.value.why.startswith("0 and 255 look like background and object")
    assert refused.value.hint == "--num_classes 2 --mask_values 0,255"
    data = opened(root, num_classes=2, values=(0, 255))
    assert data.pair(data.train, 0)[1][::8, ::8].tolist() == [[0, 1], [1, 0]]
    assert data.names == (["background", "object"] if names else ["class 0", "class 255"])


@pytest.mark.parametrize(
    ("values", "options", "error", "hint"),
    [
        ([[0, 38]], {}, "no mask holds value 1-37, others go up to 38", "--mask_values 0,38 "),
        ([[0, 128, 250]], {}, "do not hold class numbers", "--mask_values 0,128,250 "),
        ([[0, 1, 3]], {}, "no mask holds value 2, others go up to 3", "--mask_values 0,1,3 "),
        ([[0, 1]], {"num_classes": 3}, r"the class 2 \(class 2\) occurs in none of the 4 masks", "--mask_values 0,1 "),
        (
            [[0, 3]],
            {"num_classes": 4},
            r"the class 1 \(class 1\) occurs in none of the 4 masks \(and",
            "--mask_values 0,3 ",
        ),
    ],
)
def test_a_class_that_occurs_nowhere_is_refused(tmp_path, values, options, error, hint):
    with pytest.raises(UserError, match=error) as refused:
        opened(simple(tmp_path, values), **options)
    assert refused.value.hint.startswith(hint)
    numbers = tuple(int(number) for number in hint.split()[1].split(","))
    assert opened(tmp_path, values=numbers).numbers.count == len(numbers)


def test_a_class_in_one_mask_of_many_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("mim.data.segmentation.CHECKED", 1)
    simple(tmp_path, [[0, 1]], count=4)
    pair(tmp_path, "train/images/3.jpg", "train/masks/3.png")
    assert opened(tmp_path, num_classes=3).numbers.count == 3


def test_a_value_beside_those_given_is_named(tmp_path):
    with pytest.raises(UserError, match="holds value 2, but --mask_values names 0-1") as refused:
        opened(simple(tmp_path), values=(0, 1))
    assert refused.value.hint == "--mask_values 0,1,2    or    --ignore 2,255"


def test_given_values_are_classes_in_their_order():
    numbers = ClassNumbers(3, (7, 255), values=(255, 0, 300))
    classes = numbers(torch.tensor([[0, 255, 300, 7]]), "mask")
    assert classes.tolist() == [[1, 0, 2, IGNORE]]


@pytest.mark.parametrize("values", ["0", "0,0", "a,b", "0,1,2"])
def test_values_that_cannot_be_are_refused_before_torch(values):
    options = SegmentationOptions("weights", mask_values=values, num_classes=2)
    with pytest.raises(UserError, match="--mask_values"):
        check(options, SegmentationRecipe(), Scoring())


def smoothed(values):
    """A disc of each value after the first on a ground of the first, drawn large and averaged."""
    ground, *others = values
    canvas = np.full((256, 512), ground, dtype=np.uint8)
    y, x = np.mgrid[0:256, 0:512]
    for place, value in enumerate(others):
        canvas[(y - 128) ** 2 + (x - 120 - 230 * place) ** 2 < 90**2] = value
    return Image.fromarray(canvas)


@pytest.mark.parametrize("values", [(0, 255), (0, 15), (3, 11, 20), (255, 0)])
@pytest.mark.parametrize("how", [Image.Resampling.BOX, Image.Resampling.BILINEAR])
def test_smoothed_masks_are_refused(tmp_path, values, how):
    mask = smoothed(values)
    small = torch.from_numpy(np.array(mask.resize((64, 32), how)).astype(np.int64))
    exact = torch.from_numpy(np.array(mask.resize((64, 32), Image.Resampling.NEAREST)).astype(np.int64))
    refuse_smoothed(exact, (), "exact")
    with pytest.raises(UserError, match="mask has smoothed borders") as refused:
        refuse_smoothed(small, (255,), "mask")
    assert "along borders" in refused.value.why


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_thin_outlines_are_not_taken_for_smoothing(seed):
    generator = torch.Generator().manual_seed(seed)
    refuse_smoothed(torch.randint(0, 20, (40, 60), generator=generator), (), "noise")
    outline = torch.zeros(40, 60, dtype=torch.int64)
    outline[10:30, 10:50] = 1
    outline[11:29, 11:49] = 2
    refuse_smoothed(outline, (), "a contour of one pixel")


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_turned_photo_beside_an_unturned_mask_is_named_and_the_hint_mends_it(tmp_path, orientation):
    simple(tmp_path)
    turned = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    for part in ("train", "val"):
        for n in range(2):
            write(tmp_path / f"{part}/images/{n}.png", turned, exif=exif(orientation))
            (tmp_path / f"{part}/images/{n}.jpg").unlink()
    with pytest.raises(UserError, match="has 24x16 pixels, its image 16x24") as refused:
        opened(tmp_path)
    assert "stored turned (EXIF)" in refused.value.why
    command = shlex.split(refused.value.hint.partition(":  ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    mask = next(m for m in tmp_path.rglob("masks/*.png") if str(m) in refused.value.error)
    write(tmp_path / "as_the_photo.png", VALUES, exif=exif(orientation))
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "as_the_photo.png"))
    assert np.array_equal(np.array(Image.open(mask)), np.array(expected))


@pytest.mark.parametrize(("orientation", "square", "doubt"), [(3, False, True), (6, True, True), (1, True, False)])
def test_a_turn_that_sizes_do_not_show_is_warned_of(tmp_path, orientation, square, doubt):
    values = np.array([[0, 1], [2, 1]]) if square else VALUES
    for part in ("train", "val"):
        pair(tmp_path, f"{part}/images/1.jpg", f"{part}/masks/1.png", values, exif=exif(orientation))
    notes = opened(tmp_path).notes
    assert [note[:38] for note in notes] == (["warning: 1 photos are stored turned (E"] if doubt else [])

"""Data as people have it: every trap is read right, or refused by name; none is taken for something else in silence."""

import io
import json
import tarfile
import unicodedata

import numpy as np
import pytest
from PIL import Image

from mim.data.labelled import open_labelled
from mim.data.layouts import find_parts, mask_folders, part_of
from mim.data.sources import ListSource, TarSource, open_source
from mim.errors import UserError
from mim.program import called


def picture(value=0, size=(12, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, 90, 160)).save(file, "PNG")
    return file.getvalue()


PNG = picture()


def touch(root, *paths, data=PNG):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def classes(source):
    """Class of each image by its name."""
    assert source.labels is not None
    names = [source.describe(index).rpartition("/")[2] for index in range(len(source))]
    return {name: source.classes[label] for name, label in zip(names, source.labels, strict=True)}


def names(source):
    return [source.describe(index).rpartition("/")[2] for index in range(len(source))]


# Split folders


PAIRS = [
    ("Training", "Testing"),
    ("Train", "Val"),
    ("train", "dev"),
    ("TRAIN", "TEST"),
    ("training_set", "test_set"),
    ("trainset", "testset"),
    ("seg_train", "seg_test"),
    ("train2017", "val2017"),
    ("train_images", "test_images"),
    ("train", "validate"),
    ("entrenamiento", "prueba"),
    ("Treino", "Validação"),
    ("entraînement", "validation"),
    ("apprentissage", "test"),
    ("addestramento", "test"),
    ("training", "Validierung"),
    ("训练集", "测试集"),
    ("訓練データ", "検証データ"),
    ("обучение", "тест"),
]


@pytest.mark.parametrize(("train", "held"), PAIRS)
@pytest.mark.parametrize("above", ["", "archive/", "a/b/"])
def test_split_folders_are_parts_whatever_they_are_called(tmp_path, train, held, above):
    for part in (train, held):
        touch(tmp_path, f"{above}{part}/cat/1.png", f"{above}{part}/dog/2.png")
    learnt, scored = open_source(str(tmp_path))
    assert classes(learnt) == classes(scored) == {"1.png": "cat", "2.png": "dog"}
    assert (learnt.part, scored.part) == (f"{train}/", f"{held}/")
    assert len(open_labelled(str(tmp_path)).test) == 2


def test_what_lies_beside_the_parts_is_named(tmp_path):
    touch(tmp_path, "Train/a/1.png", "Train/b/2.png", "val/a/3.png", "val/b/4.png", "test/5.png", "seg_pred/6.png")
    train, _ = open_source(str(tmp_path))
    assert train.findings() == ["val/ is held out: 2 images", "not read: seg_pred/, test/"]


@pytest.mark.parametrize("folders", [("val", "test"), ("train1", "train2"), ("Testing", "Validation")])
def test_folders_that_are_all_parts_are_no_classes(tmp_path, folders):
    touch(tmp_path, *(f"{folder}/{number}.png" for number, folder in enumerate(folders)))
    source, held = open_source(str(tmp_path))
    assert (source.labels, held, len(source)) == (None, None, 2)
    with pytest.raises(UserError, match="has no labels") as refused:
        open_labelled(str(tmp_path))
    assert "are parts of a data set, not classes" in refused.value.why


@pytest.mark.parametrize(
    "folders",
    [("trainA", "trainB", "testA", "testB"), ("mnist_train", "mnist_test"), ("a_training", "b_val", "c_test")],
)
def test_folders_that_all_name_a_part_are_no_classes_either(tmp_path, folders):
    touch(tmp_path, *(f"{folder}/{number}.png" for folder in folders for number in range(2)))
    source, held = open_source(str(tmp_path))
    assert (source.labels, held) == (None, None)
    assert "are parts of a data set, not classes" in source.unclear.why
    assert len(open_labelled(str(tmp_path), label_column="1").classes) == len(folders)


PIECES = ["images_{:03d}/images", "HAM10000_images_part_{}", "fold_{}", "data-batch-{}", "Part {}", "shard{}"]


@pytest.mark.parametrize("name", PIECES)
def test_the_numbered_pieces_of_a_set_are_no_classes(tmp_path, name):
    touch(tmp_path, *(f"{name.format(n)}/{n}-{number}.png" for n in (1, 2, 3) for number in range(2)))
    source, _ = open_source(str(tmp_path))
    assert source.labels is None
    assert "look like the numbered pieces of one set" in source.unclear.why
    with pytest.raises(UserError, match="has no labels"):
        open_labelled(str(tmp_path))
    assert len(open_labelled(str(tmp_path), label_column="1").classes) == 3


@pytest.mark.parametrize("names", [("0", "1"), ("class_1", "class_2"), ("n01440764", "n01443537"), ("img", "other")])
def test_numbers_and_numbered_classes_are_classes(tmp_path, names):
    touch(tmp_path, *(f"{name}/{number}.png" for name in names for number in range(2)))
    assert open_source(str(tmp_path))[0].classes == list(names)


def test_a_folder_without_images_is_no_class_and_is_named(tmp_path):
    touch(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / "bird").mkdir()
    source, _ = open_source(str(tmp_path))
    assert source.classes == ["cat", "dog"]
    assert source.findings() == ["no images in bird/: not among the classes"]


def test_an_image_that_was_left_beside_class_folders_is_named(tmp_path):
    touch(tmp_path, "sheet.png", *(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3)))
    with pytest.raises(UserError, match="has no labels") as refused:
        open_labelled(str(tmp_path))
    assert refused.value.why == "sheet.png lies beside cat/, dog/, so that folders are no classes"


def test_a_part_without_labels_beside_one_with_labels_can_be_left_out(tmp_path):
    touch(tmp_path, "test/1.png", *(f"train/{name}/{number}.png" for name in ("cat", "dog") for number in range(3)))
    with pytest.raises(UserError, match="test/ has no labels") as refused:
        open_labelled(str(tmp_path))
    assert refused.value.hint == f"--data {tmp_path}/train"
    assert open_labelled(refused.value.hint.removeprefix("--data ")).classes == ["cat", "dog"]


def test_a_table_beside_images_without_labels_is_offered(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,dog\nb.png,cat\n")
    with pytest.raises(UserError, match="has no labels") as refused:
        open_labelled(str(tmp_path))
    assert refused.value.hint == f"--data {tmp_path}/metadata.csv"
    assert open_labelled(refused.value.hint.removeprefix("--data ")).classes == ["cat", "dog"]


def test_a_table_that_lies_apart_from_its_images_says_where_they_are(tmp_path):
    touch(tmp_path, "images/a.png", "images/b.png")
    (tmp_path / "labels.csv").write_text("image,label\na.png,dog\nb.png,cat\n")
    with pytest.raises(UserError, match="none of the first 2 files exists") as refused:
        open_labelled(str(tmp_path / "labels.csv"))
    place = tmp_path / "images"
    assert refused.value.hint == f"cp {tmp_path}/labels.csv {place}   then   --data {place}/labels.csv"


def test_one_class_alone_measures_nothing(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text("path,label\na.png,dog\nb.png,dog\n")
    with pytest.raises(UserError, match="every image is of the class dog"):
        open_labelled(str(tmp_path / "list.csv"))


def test_a_class_called_like_a_part_is_one_among_others(tmp_path):
    touch(tmp_path, "bus/1.png", "train/2.png", "car/3.png")
    assert classes(open_source(str(tmp_path))[0]) == {"1.png": "bus", "2.png": "train", "3.png": "car"}


@pytest.mark.parametrize("outer", [("Art", "Clipart", "Photo"), ("cat", "dog")])
@pytest.mark.parametrize("inner", [("train", "test"), ("alarm", "bike", "chair")])
def test_classes_that_hold_the_same_folders_are_refused(tmp_path, outer, inner):
    touch(tmp_path, *(f"{a}/{b}/{n}.png" for n, (a, b) in enumerate((a, b) for a in outer for b in inner)))
    with pytest.raises(UserError) as refused:
        open_labelled(str(tmp_path))
    assert "holds the same folders" in refused.value.why
    assert refused.value.hint.startswith(f"--label_column 1   for {', '.join(sorted(outer))}")
    assert open_source(str(tmp_path))[0].findings()[0].startswith("no labels: every folder")
    for level, expected in ((1, outer), (2, inner)):
        assert open_labelled(str(tmp_path), label_column=str(level)).classes == sorted(expected)


def test_one_folder_inside_every_class_is_no_doubt(tmp_path):
    touch(tmp_path, "n01/images/1.png", "n02/images/2.png")
    assert classes(open_source(str(tmp_path))[0]) == {"1.png": "n01", "2.png": "n02"}


@pytest.mark.parametrize("level", ["3", "0", "x"])
def test_a_level_without_folders_is_named(tmp_path, level):
    touch(tmp_path, "a/x/1.png", "b/y/2.png")
    with pytest.raises(UserError, match=f"--label_column {level}: not every image lies in such a folder"):
        open_source(str(tmp_path), label_column=level)


@pytest.mark.parametrize("name", ["cat", "trainer", "test_bench", "evil", "training day", "1", ""])
def test_other_names_are_no_parts(name):
    assert part_of(name) is None


def test_of_two_parts_of_one_meaning_the_plain_name_wins():
    assert find_parts(["train1", "train2", "val"]) is None
    assert find_parts(["dev", "train", "train2", "val"]) == ("train", "val")


# Tables


def table(root, text, name="list.csv", encoding="utf-8"):
    touch(root, "a.png", "b.png", "sub/c.png")
    (root / name).write_bytes(text.encode(encoding))
    return str(root / name)


EXPECTED = {"a.png": "dog", "b.png": "cat", "c.png": "dog"}

TABLES = {
    "path, label": "path,label\na.png,dog\nb.png,cat\nsub/c.png,dog\n",
    "no heading": "a.png,dog\nb.png,cat\nsub/c.png,dog\n",
    "filename, class": "filename,class\na.png,dog\nb.png,cat\nsub/c.png,dog\n",
    "unknown headings": "what,is it\na.png,dog\nb.png,cat\nsub/c.png,dog\n",
    "label first": "label,file_name\ndog,a.png\ncat,b.png\ndog,sub/c.png\n",
    "label first, no heading": "dog,a.png\ncat,b.png\ndog,sub/c.png\n",
    "label among others": "Path,Sex,Age,Label\na.png,M,3,dog\nb.png,M,4,cat\nsub/c.png,F,4,dog\n",
    "semicolons": "image;target\na.png;dog\nb.png;cat\nsub/c.png;dog\n",
    "tabs": "image\ttarget\na.png\tdog\nb.png\tcat\nsub/c.png\tdog\n",
    "pandas' index": ",path,category\n0,a.png,dog\n1,b.png,cat\n2,sub/c.png,dog\n",
    "a numbered index": "id,path,kind\n1,a.png,dog\n2,b.png,cat\n3,sub/c.png,dog\n",
    "an index without heading": "0,a.png,dog\n1,b.png,cat\n2,sub/c.png,dog\n",
    "windows paths": "path,label\n.\\a.png,dog\n.\\b.png,cat\nsub\\c.png,dog\n",
    "windows lines": "path,label\r\na.png,dog\r\nb.png,cat\r\nsub/c.png,dog\r\n",
    "a mark in front": "\ufeffpath,label\na.png,dog\nb.png,cat\nsub/c.png,dog\n",
    "blanks": "path, label\na.png, dog\nb.png, cat \nsub/c.png, dog\n",
    "one-hot": "image,dog,cat\na.png,1,0\nb.png,0,1\nsub/c.png,1,0\n",
    "one-hot floats": "image,dog,cat\na.png,1.0,0.0\nb.png,0.0,1.0\nsub/c.png,1.0,0.0\n",
    "number and name": "class id,filepaths,labels\n1,a.png,dog\n0,b.png,cat\n1,sub/c.png,dog\n",
    "a remark in front": "# made by hand\npath,label\na.png,dog\nb.png,cat\nsub/c.png,dog\n",
    "a mask's path": "image,mask,label\na.png,x.png,dog\nb.png,y.png,cat\nsub/c.png,z.png,dog\n",
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_a_table_is_read_by_its_columns(tmp_path, text):
    assert classes(open_labelled(table(tmp_path, text)).train) == EXPECTED


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("list.tsv", "path\tlabel\na.png\tdog\nb.png\tcat\nsub/c.png\tdog\n", "utf-8"),
        ("list.csv", TABLES["path, label"], "utf-16"),
        ("list.txt", "a.png dog\nb.png cat\nsub/c.png dog\n", "utf-8"),
    ],
)
def test_lists_come_in_other_files_too(tmp_path, name, text, encoding):
    assert classes(open_labelled(table(tmp_path, text, name, encoding)).train) == EXPECTED


@pytest.mark.parametrize("heading", ["split", "Set", "data set"])
@pytest.mark.parametrize(("train", "held"), PAIRS[:4])
def test_the_rows_of_a_table_may_be_parts(tmp_path, heading, train, held):
    text = f"path,label,{heading}\na.png,dog,{train}\nb.png,cat,{train}\nsub/c.png,dog,{held}\nd.png,cat,{held}\n"
    train_source, held_source = open_source(table(tmp_path, text))
    assert classes(train_source) == {"a.png": "dog", "b.png": "cat"}
    assert classes(held_source) == {"c.png": "dog", "d.png": "cat"}


@pytest.mark.parametrize(
    ("heading", "cells", "part"),
    [
        ("is_valid", ("False", "True"), "val"),
        ("is_test", ("0", "1"), "test"),
        ("isTrain", ("1", "0"), "val"),
        ("Test", ("no", "yes"), "test"),
        ("is_validation", ("", "TRUE"), "val"),
    ],
)
def test_a_column_may_ask_whether_a_row_belongs_to_a_part(tmp_path, heading, cells, part):
    learnt, scored = cells
    rows = f"a.png,dog,{learnt}\nb.png,cat,{learnt}\nsub/c.png,dog,{scored}\n"
    train, held = open_source(table(tmp_path, f"path,label,{heading}\n{rows}"), same_classes=False)
    assert (names(train), names(held)) == (["a.png", "b.png"], ["c.png"])
    assert train.notes == [f"rows of {part} are held out: 1 images"]


@pytest.mark.parametrize("heading", ["path,label", "filename,class"])
def test_an_image_that_is_listed_with_two_labels_has_several(tmp_path, heading):
    text = f"{heading}\na.png,dog\na.png,cat\nb.png,cat\n"
    source, _ = open_source(table(tmp_path, text))
    assert source.labels is None
    assert source.unclear.why.endswith("a.png is listed as dog and cat: several labels; probes know one per image")


def test_rows_that_repeat_an_image_are_counted(tmp_path):
    source, _ = open_source(table(tmp_path, "path,label\na.png,dog\na.png,dog\nb.png,cat\n"))
    assert len(source) == 3
    assert source.notes == ["1 rows repeat an image, which may then be learnt from and scored"]


@pytest.mark.parametrize(("cells", "refused"), [("-101", True), ("-11", False)])
def test_minus_one_beside_numbers_from_zero_is_no_class(tmp_path, cells, refused):
    labels = cells.replace("-1", "m")
    rows = "".join(
        f"{name},{'-1' if label == 'm' else label}\n"
        for name, label in zip(["a.png", "b.png", "sub/c.png"], labels, strict=False)
    )
    source, _ = open_source(table(tmp_path, f"path,label\n{rows}"))
    assert (source.labels is None) is refused


@pytest.mark.parametrize("empty", ["", "nan", "NaN"])
def test_a_row_without_a_label_is_named(tmp_path, empty):
    with pytest.raises(UserError, match=r"b\.png has no label, others have"):
        open_source(table(tmp_path, f"path,label\na.png,dog\nb.png,{empty}\nsub/c.png,dog\n"))


def test_labels_that_are_not_in_utf_8_can_be_printed(tmp_path):
    text = "path,label\na.png,Café\nb.png,Thé\nsub/c.png,Café\n"
    source, _ = open_source(table(tmp_path, text, encoding="cp1252"))
    assert source.classes == ["Café", "Thé"]


def test_rows_of_a_third_part_are_named(tmp_path):
    text = "path,split\na.png,train\nb.png,val\nsub/c.png,test\n"
    train, held = open_source(table(tmp_path, text))
    assert (names(train), names(held)) == (["a.png"], ["b.png"])
    assert train.findings() == ["rows of val are held out: 1 images", "not read: 1 rows of other parts"]


def test_a_split_of_unknown_parts_is_refused(tmp_path):
    with pytest.raises(UserError, match="column split does not say which images to train on") as refused:
        open_source(table(tmp_path, "path,split\na.png,train\nb.png,3\nsub/c.png,\n"))
    assert refused.value.why == "it holds (empty), 3"


AMBIGUOUS = {
    "columns Sex, Age, Ill could each be the label": "Path,Sex,Age,Ill\na.png,M,3,1\nb.png,M,4,0\nsub/c.png,F,4,1\n",
    "columns 2, 3 could each be the label": "a.png,dog,x\nb.png,cat,x\nsub/c.png,dog,y\n",
    "columns fog, rain give an image several labels": "path,fog,rain\na.png,1,1\nb.png,0,1\nsub/c.png,0,0\n",
    "columns fog, ice give an image several labels": "path,fog,ice\na.png,1.0,-1.0\nb.png,,1.0\nsub/c.png,0.0,\n",
    "column label holds several labels (cat|dog)": "path,label\na.png,cat|dog\nb.png,cat\nsub/c.png,dog\n",
    "column label holds several labels ([cat, dog])": 'path,label\na.png,"[cat, dog]"\nb.png,x\nsub/c.png,y\n',
    "columns label, class could each be the label": "path,label,class\na.png,1,x\nb.png,0,x\nsub/c.png,1,y\n",
}


@pytest.mark.parametrize(("why", "text"), AMBIGUOUS.items())
def test_a_doubtful_label_is_refused_and_pretraining_goes_without(tmp_path, why, text):
    file = table(tmp_path, text)
    with pytest.raises(UserError, match="has no labels") as refused:
        open_labelled(file)
    assert refused.value.why.startswith(why)
    source, _ = open_source(file)
    assert source.labels is None
    assert source.findings()[0].startswith(f"no labels: {why}")
    column = refused.value.hint.split()[1]  # the hint works
    assert len(open_labelled(file, label_column=column).classes) >= 2


@pytest.mark.parametrize(("column", "expected"), [("Sex", ["F", "M"]), ("3", ["3", "4"])])
def test_a_column_can_be_named_or_numbered(tmp_path, column, expected):
    file = table(tmp_path, "Path,Sex,Age\na.png,M,3\nb.png,M,4\nsub/c.png,F,4\n")
    assert open_labelled(file, label_column=column).classes == expected


def test_a_column_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="--label_column sex: ") as refused:
        open_source(table(tmp_path, "Path,Sex,Age\na.png,M,3\n"), label_column="sex")
    assert refused.value.why == "it has Path, Sex, Age"


def test_another_value_in_every_row_is_no_class(tmp_path):
    touch(tmp_path, *(f"{n}.png" for n in range(20)))
    (tmp_path / "list.csv").write_text("path,caption\n" + "".join(f"{n}.png,words {n}\n" for n in range(20)))
    source = ListSource(tmp_path / "list.csv")
    assert source.labels is None
    assert "another value in every row" in source.findings()[0]


@pytest.mark.parametrize(
    ("text", "error", "why"),
    [
        ("left,right\na.png,b.png\n", "columns left and right both name files", "one of them must be called path"),
        ("path,label\nC:\\data\\a.png,dog\n", "none of the first 1 files exists", "a drive of another machine"),
        ("image_id,label\nISIC_1,dog\n", "none of the first 1 files exists", "column image_id holds no file names"),
    ],
)
def test_paths_that_lead_nowhere_say_why(tmp_path, text, error, why):
    with pytest.raises(UserError) as refused:
        open_source(table(tmp_path, text))
    assert error in refused.value.error
    assert why in refused.value.why


def test_a_label_called_like_a_folder_beside_the_list_is_a_label(tmp_path):
    touch(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / "list.csv").write_text("cat/1.png,cat\ndog/2.png,dog\n")
    assert classes(ListSource(tmp_path / "list.csv")) == {"1.png": "cat", "2.png": "dog"}


# Masks among photos


MASKS = {
    "images, annotations": ("images/{}", "annotations/{}"),
    "images, masks": ("images/{}", "masks/{}"),
    "images, labels": ("images/{}", "labels/{}"),
    "imgs, gt": ("imgs/{}", "gt/{}"),
    "Images, Ground_Truth": ("Images/{}", "Ground_Truth/{}"),
    "Pascal VOC": ("JPEGImages/{}", "SegmentationClass/{}"),
    "raw": ("raw_images/{}", "masks/{}"),
    "beside": ("{}", "{}_mask"),
    "within": ("photos/images/{}", "photos/masks/{}"),
}


@pytest.mark.parametrize(("photo", "mask"), MASKS.values(), ids=MASKS)
def test_masks_are_not_photos(tmp_path, photo, mask):
    for name in ("a", "b"):
        touch(tmp_path, f"{photo.format(name)}.png", f"{mask.format(name)}.png")
    source, held = open_source(str(tmp_path))
    assert (names(source), source.labels, held) == (["a.png", "b.png"], None, None)
    assert "2 masks" in source.findings()[0]
    with pytest.raises(UserError) as refused:
        open_labelled(str(tmp_path))
    assert "masks are for  python -m mim segment" in refused.value.why


PARTED = {
    "ADE20K": ("images/{part}/{name}.png", "annotations/{part}/{name}.png", ("training", "validation")),
    "images/train": ("images/{part}/{name}.png", "masks/{part}/{name}.png", ("train", "val")),
    "train/images": ("{part}/images/{name}.png", "{part}/masks/{name}.png", ("train", "val")),
    "Train/Images": ("{part}/Images/{name}.png", "{part}/Labels/{name}.png", ("Train", "Test")),
    "train_masks": ("{part}/{name}.png", "{part}_masks/{name}.png", ("train", "val")),
    "CamVid": ("{part}/{name}.png", "{part}annot/{name}.png", ("train", "val")),
    "Cityscapes": (
        "leftImg8bit/{part}/aachen/{name}_leftImg8bit.png",
        "gtFine/{part}/aachen/{name}_gtFine_labelIds.png",
        ("train", "val"),
    ),
}


@pytest.mark.parametrize(("photo", "mask", "parts"), PARTED.values(), ids=PARTED)
def test_masks_are_not_photos_in_parts_either(tmp_path, photo, mask, parts):
    for part in parts:
        for name in ("a", "b"):
            touch(tmp_path, photo.format(part=part, name=name), mask.format(part=part, name=name))
    train, held = open_source(str(tmp_path))
    assert [name[0] for name in (*names(train), *names(held))] == ["a", "b"] * 2
    assert train.labels is None
    assert any("masks" in line for line in train.findings())


def test_cities_are_no_classes(tmp_path):
    for part, cities in (("train", ("aachen", "bonn")), ("val", ("ulm", "berlin"))):
        touch(tmp_path, *(f"leftImg8bit/{part}/{city}/{city}_leftImg8bit.png" for city in cities))
    train, held = open_source(str(tmp_path))
    assert (train.labels, held.labels) == (None, None)


@pytest.mark.parametrize(
    "folders",
    [("with_mask", "without_mask"), ("mask", "no_mask"), ("face", "face_mask"), ("images", "drawings"), ("label",)],
)
def test_classes_with_such_names_stay_classes(folders):
    assert mask_folders(folders) == {}


def test_the_halves_of_a_set_for_detection_are_photos_alone(tmp_path):
    touch(tmp_path, "images/train/1.png", "images/val/2.png", "labels/train/1.txt", "labels/val/2.txt")
    train, held = open_source(str(tmp_path))
    assert (names(train), names(held)) == (["1.png"], ["2.png"])
    assert train.findings() == ["val/ is held out: 1 images"]


# Tar files


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return str(path)


def label(name):
    return json.dumps({"label": name}).encode()


def test_a_key_with_dots_keeps_its_label(tmp_path):
    members = {}
    for number, name in ((3, "cat"), (4, "dog"), (5, "cat")):
        members |= {f"scene_0.{number}.png": PNG, f"scene_0.{number}.json": label(name)}
    assert classes(TarSource(tar(tmp_path / "x.tar", members))) == {
        "scene_0.3.png": "cat",
        "scene_0.4.png": "dog",
        "scene_0.5.png": "cat",
    }


def test_a_label_of_several_images_belongs_to_none(tmp_path):
    members = {"s.1.png": PNG, "s.2.png": PNG, "s.cls": b"1", "t.png": PNG, "t.cls": b"2"}
    source = TarSource(tar(tmp_path / "x.tar", members))
    assert classes(source) == {"t.png": "2"}
    assert [error.reason for error in source.damaged] == ["has no label, others have"] * 2


@pytest.mark.parametrize("field", ["label", "class", "cls", "target", "category"])
def test_a_label_may_be_called_otherwise(tmp_path, field):
    members = {"a.png": PNG, "a.json": json.dumps({field: "cat", "width": 3}).encode(), "b.png": PNG, "b.cls": b"dog"}
    assert classes(TarSource(tar(tmp_path / "x.tar", members))) == {"a.png": "cat", "b.png": "dog"}


def test_several_labels_are_refused(tmp_path):
    members = {"a.png": PNG, "a.json": b'{"label": [1, 2]}', "b.png": PNG, "b.json": b'{"label": [1]}'}
    with pytest.raises(UserError) as refused:
        open_labelled(tar(tmp_path / "x.tar", members))
    assert "a.json holds several labels" in refused.value.why
    assert refused.value.hint.startswith(f"{called('pretrain')} --data {tmp_path / 'x.tar'}   needs none")


@pytest.mark.parametrize("mask", ["k.seg.png", "k.mask.png", "k_mask.png", "k.png"])
def test_one_plain_image_per_key(tmp_path, mask):
    source = TarSource(
        tar(tmp_path / "x.tar", {"k.jpg": PNG, mask: picture(7), "k.cls": b"1", "l.jpg": PNG, "l.cls": b"2"})
    )
    assert classes(source) == {"k.jpg": "1", "l.jpg": "2"}
    assert sum(source.ignored.values()) == 1


def test_what_systems_leave_behind_is_skipped(tmp_path):
    waste = {"._a.jpg": b"x", "__MACOSX/a.jpg": b"x", "photos/@eaDir/a.jpg": b"x", "._a.cls": b"9", "./a.jpg": PNG}
    source = TarSource(tar(tmp_path / "x.tar", waste))
    assert names(source) == ["a.jpg"]
    assert source.labels is None
    assert source.ignored == {"._* (macOS)": 2, "hidden or waste folder": 2}


def test_masks_and_parts_in_a_tar_are_no_classes(tmp_path):
    masks = tar(tmp_path / "x.tar", {"d/images/1.png": PNG, "d/images/2.png": PNG, "d/masks/1.png": PNG})
    assert (len(TarSource(masks)), TarSource(masks).labels) == (2, None)
    parts = tar(tmp_path / "y.tar", {"train/cat/1.png": PNG, "val/cat/2.png": PNG})
    with pytest.raises(UserError) as refused:
        open_labelled(parts)
    assert "train/, val/ are parts of a data set" in refused.value.why
    assert open_labelled(parts, label_column="1").classes == ["train", "val"]


def test_the_last_of_two_members_of_one_name_counts(tmp_path):
    source = TarSource(tar(tmp_path / "x.tar", [("a.png", picture(1)), ("b.png", PNG), ("a.png", picture(2))]))
    assert sorted(names(source)) == ["a.png", "b.png"]
    assert source.read(names(source).index("a.png"))[0, 0, 0] == 2


# Names and waste


NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def test_two_spellings_of_an_accent_are_one_class(tmp_path):
    touch(tmp_path, f"{NFC}/1.png", f"{NFD}/2.png", "thé/3.png")
    assert open_source(str(tmp_path))[0].classes == [NFC, "thé"]
    (tmp_path / "list.csv").write_text(f"{NFC}/1.png,{NFC}\n{NFC}/2.png,{NFD}\nthé/3.png,thé\n")
    source = ListSource(tmp_path / "list.csv")
    assert source.classes == [NFC, "thé"]
    assert source.read(1).shape == (3, 8, 12)


@pytest.mark.parametrize("folder", ["@eaDir", "__MACOSX", ".thumbnails", "$RECYCLE.BIN"])
def test_thumbnails_and_waste_are_no_photos(tmp_path, folder):
    touch(tmp_path, "cat/1.png", "dog/2.png", f"cat/{folder}/1.png/thumb.png", f"{folder}/x.png")
    source, _ = open_source(str(tmp_path))
    assert classes(source) == {"1.png": "cat", "2.png": "dog"}
    assert sum(source.ignored.values()) == 2


def test_masks_beside_their_photos_are_named(tmp_path):
    touch(
        tmp_path,
        "benign/1 (1).png",
        "benign/1 (1)_mask.png",
        "benign/1 (1)_mask_1.png",
        "normal/2.png",
        "normal/3_mask.png",
    )
    source, _ = open_source(str(tmp_path))
    assert names(source) == ["1 (1).png", "2.png", "3_mask.png"]
    assert source.findings() == [
        "2 masks beside their images, such as benign/1 (1)_mask.png: not read",
    ]


def test_pixels_are_those_of_the_files(tmp_path):
    touch(tmp_path, "Training/a/1.png", "Training/b/2.png", "Testing/a/3.png", "Testing/b/4.png", data=picture(77))
    train, held = open_source(str(tmp_path))
    assert {int(source.read(index)[0].unique()) for source in (train, held) for index in range(2)} == {77}
    assert np.shape(train.read(0)) == (3, 8, 12)

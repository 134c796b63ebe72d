import csv
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from hostile import bad, colour, encode, legal
from PIL import Image

from mim.data.images import ImageError
from mim.data.sources import FolderSource, ListSource, TarSource, open_source
from mim.errors import UserError

PNG = encode(Image.fromarray(colour()), "PNG")


def touch(root, *paths, data=PNG):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def names(source):
    return [source.describe(index).rpartition("/")[2] for index in range(len(source))]


def tar(path, members):
    """A tar file of (name, content) or ready-made ``TarInfo``."""
    with tarfile.open(path, "w") as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                name, content = member
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


# Folders


def test_a_nested_folder_gives_its_images_sorted(tmp_path):
    touch(tmp_path, "b/2.png", "b/deep/er/1.JPG", "a.png", "b/10.png")
    source = FolderSource(tmp_path)
    assert names(source) == ["a.png", "10.png", "2.png", "1.JPG"]
    assert source.labels is None
    assert source.classes == []
    assert source.read(0).shape == (3, 24, 32)


def test_class_folders_are_labels(tmp_path):
    touch(tmp_path, "dog/x/1.png", "cat/1.png", "cat/2.png", "10/1.png", "9/1.png")
    source = FolderSource(tmp_path)
    assert source.classes == ["9", "10", "cat", "dog"]
    assert [source.classes[label] for label in source.labels] == ["10", "9", "cat", "cat", "dog"]


def test_class_folders_are_found_below_the_one_folder_that_holds_all(tmp_path):
    touch(tmp_path, "photos/train/cat/1.png", "photos/train/cathedral/1.png")
    assert FolderSource(tmp_path).classes == ["cat", "cathedral"]


@pytest.mark.parametrize("paths", [["cat/1.png", "cat/2.png"], ["cat/1.png", "dog/1.png", "1.png"], ["1.png", "2.png"]])
def test_one_folder_or_images_beside_folders_are_no_labels(tmp_path, paths):
    touch(tmp_path, *paths)
    assert FolderSource(tmp_path).labels is None


def test_other_files_are_counted_by_type(tmp_path):
    touch(tmp_path, "a.png", "b.HEIC", "c.heic", "notes.txt", "Makefile", "._a.png", ".git/x.png", "x.{}", data=PNG)
    assert FolderSource(tmp_path).ignored == {
        ".heic": 2,
        ".txt": 1,
        "no suffix": 2,
        "._* (macOS)": 1,
        "hidden folder": 1,
    }


def test_a_link_is_followed_once_and_never_back(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    touch(root, "z/1.png")
    touch(outside, "deep/2.png")
    for name, target in {
        "a": root / "z",
        "up": tmp_path,
        "self": root,
        "out": outside,
        "out2": outside / "deep",
    }.items():
        (root / name).symlink_to(target)
    (root / "ring").symlink_to(root / "ring")
    (outside / "back").symlink_to(root)
    paths = [FolderSource(root).describe(index) for index in range(2)]
    assert paths == [f"{root}/out/deep/2.png", f"{root}/z/1.png"]
    assert len(FolderSource(root)) == 2


def test_whatever_is_called_an_image_is_named_when_it_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "nowhere.jpg").symlink_to("nothing")
    (tmp_path / "ring.jpg").symlink_to(tmp_path / "ring.jpg")
    source = FolderSource(tmp_path)
    for index, name in enumerate(["nowhere.jpg", "pipe.jpg", "ring.jpg"]):
        with pytest.raises(ImageError, match=name):
            source.read(index)


def test_a_hostile_folder_gives_every_legal_image_and_names_every_bad_one(tmp_path):
    touch_all = {case.name: case for case in (*legal(), *bad())}
    for name, case in touch_all.items():
        (tmp_path / name).write_bytes(case.data)
    source = FolderSource(tmp_path)
    refused = []
    for index in range(len(source)):
        try:
            source.read(index)
        except ImageError as error:
            refused.append(error.path.rpartition("/")[2])
    assert sorted(refused) == sorted(case.name for case in bad())
    assert len(source) == len(touch_all)


def test_names_of_any_bytes_are_read_and_shown_on_one_line(tmp_path):
    for name in (b"line\nbreak.png", b"not-\xff-utf8.png", "ü🙂 .png".encode()):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(PNG)
    source = FolderSource(tmp_path)
    assert [source.read(index).shape for index in range(3)] == [(3, 24, 32)] * 3
    assert names(source) == [r"line\nbreak.png", r"not-\udcff-utf8.png", "ü🙂 .png"]


def test_an_unreadable_folder_is_counted(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "shut/b.png")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert FolderSource(tmp_path).ignored == {"unreadable folder": 1}


def test_a_million_paths_cost_little_to_send(tmp_path):
    touch(tmp_path, *(f"{i}.png" for i in range(100)), data=b"")
    assert len(pickle.dumps(FolderSource(tmp_path))) < 100 * (len(str(tmp_path)) + 20) + 1000


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_outside_is_an_error(tmp_path, index):
    touch(tmp_path, "a.png", "b.png")
    with pytest.raises(IndexError):
        FolderSource(tmp_path).describe(index)


# Train and held-out


@pytest.mark.parametrize("part", ["val", "valid", "validation", "test"])
def test_train_and_a_held_out_folder_are_a_pair(tmp_path, part):
    touch(tmp_path, "train/cat/1.png", "train/dog/2.png", f"{part}/dog/3.png", f"{part}/cat/4.png")
    train, held_out = open_source(str(tmp_path))
    assert (train.name, names(train)) == (tmp_path.name, ["1.png", "2.png"])
    assert (held_out.classes, held_out.labels, names(held_out)) == (["cat", "dog"], [0, 1], ["4.png", "3.png"])


def test_a_folder_without_parts_holds_nothing_out(tmp_path):
    touch(tmp_path, "cat/1.png", "val/1.png")
    train, held_out = open_source(str(tmp_path))
    assert (train.classes, held_out) == (["cat", "val"], None)


def test_parts_of_different_classes_are_refused(tmp_path):
    touch(tmp_path, "train/cat/1.png", "train/dog/2.png", "train/fox/2.png", "val/dog/3.png", "val/cat/4.png")
    with pytest.raises(UserError) as mistake:
        open_source(str(tmp_path))
    assert mistake.value.error == f"--data {tmp_path}: train/ has 3 classes, val/ has 2  (missing in val: fox)"
    assert f"--data {tmp_path}/train" in mistake.value.hint


@pytest.mark.parametrize("opened", ["", "train"])
def test_masks_beside_images_are_not_a_class(tmp_path, opened):
    for part in ("train", "val"):
        touch(tmp_path, *(f"{part}/{kind}/{label}/1.png" for kind in ("images", "masks") for label in ("a", "b")))
    for source in filter(None, open_source(str(tmp_path / opened))):
        assert source.classes == ["a", "b"]
        assert len(source) == 2


def test_an_unlabelled_held_out_part_is_allowed(tmp_path):
    touch(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/3.png")
    assert open_source(str(tmp_path))[1].labels is None


# Lists


def test_a_text_list_keeps_its_order_and_starts_at_its_folder(tmp_path):
    touch(tmp_path, "b.png", "sub/a.png", "c d,.png")
    (tmp_path / "list.txt").write_text(f"c d,.png\r\nsub/a.png\n\n{tmp_path}/b.png")
    source, held_out = open_source(str(tmp_path / "list.txt"))
    assert (source.name, held_out, names(source)) == ("list", None, ["c d,.png", "a.png", "b.png"])
    assert source.read(2).shape == (3, 24, 32)


@pytest.mark.parametrize("heading", ["path,label\n", "", "\ufeffPath,Label\n"])
def test_a_table_gives_labels_by_name(tmp_path, heading):
    touch(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "list.csv").write_text(heading + 'a.png,dog\n"b.png",cat\nc.png,cat\n')
    source = ListSource(tmp_path / "list.csv")
    assert (source.classes, source.labels) == (["cat", "dog"], [1, 0, 0])


def test_a_table_of_paths_alone_has_no_labels(tmp_path):
    touch(tmp_path, "a.png")
    (tmp_path / "list.csv").write_text("path\na.png\n")
    source = ListSource(tmp_path / "list.csv")
    assert (len(source), source.labels) == (1, None)


def test_a_table_of_names_with_line_breaks_comes_back(tmp_path):
    touch(tmp_path, "a\nb.png")
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerow(["a\nb.png"])
    assert ListSource(tmp_path / "list.csv").read(0).shape == (3, 24, 32)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "0 images"),
        ("path,label\n", "0 images"),
        ("a.png,cat\nb.png,\n", "b.png has no label"),
        ("nowhere.png\n", "none of the first 1 files exists"),
        ("a\0.png", "none of the first|is not a CSV file"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, content, error):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(UserError, match=error):
        ListSource(tmp_path / "list.csv")


# Tar shards


def test_shards_give_images_and_labels_at_random(tmp_path):
    for shard in range(2):
        tar(
            tmp_path / f"train-00{shard}.tar",
            [(f"{n}.png", PNG) for n in range(2)] + [(f"{n}.cls", str(10 + n).encode()) for n in range(2)],
        )
    source, _ = open_source(str(tmp_path / "train-{000..001}.tar"))
    assert (source.name, names(source)) == ("train", ["0.png", "1.png", "0.png", "1.png"])
    assert (source.classes, source.labels) == (["10", "11"], [0, 1, 0, 1])
    assert pickle.loads(pickle.dumps(source)).read(3).shape == (3, 24, 32)


def test_each_member_is_its_own_bytes(tmp_path):
    contents = [encode(Image.fromarray(np.full((8, 8, 3), value, np.uint8)), "PNG") for value in (1, 2, 3)]
    long_name = "folder/" * 30 + "c.png"
    source = TarSource(str(tar(tmp_path / "x.tar", zip(["a.png", "b.txt", long_name], contents, strict=True))))
    assert [source.read(index).unique().tolist() for index in range(2)] == [[1], [3]]
    assert source.ignored == {".txt": 1}


def test_labels_come_from_json_or_from_folders(tmp_path):
    members = [("a.png", PNG), ("a.json", b'{"label": "cat"}'), ("b.png", PNG), ("b.json", b'{"label": 3}')]
    assert TarSource(str(tar(tmp_path / "x.tar", members))).classes == ["3", "cat"]
    folders = [("dog/a.png", PNG), ("cat/b.png", PNG), ("dog/c.png", PNG), ("cat/b.json", b"[" * 100_000)]
    assert TarSource(str(tar(tmp_path / "y.tar", folders))).labels == [1, 0, 1]


def test_an_image_without_a_label_among_labelled_ones_is_named(tmp_path):
    source = TarSource(str(tar(tmp_path / "x.tar", [("a.png", PNG), ("a.cls", b"1"), ("b.png", PNG)])))
    assert (names(source), [error.path for error in source.damaged]) == (["a.png"], [f"{tmp_path}/x.tar/b.png"])


def test_links_devices_pickles_and_paths_upwards_do_nothing(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    members = [
        ("../../up.png", PNG),
        ("/tmp/absolute.png", PNG),
        special("link.png", tarfile.SYMTYPE, str(secret)),
        special("hard.png", tarfile.LNKTYPE, str(secret)),
        special("pipe.png", tarfile.FIFOTYPE),
        special("device.png", tarfile.CHRTYPE),
        ("code.pkl", pickle.dumps(print)),
        ("empty.png", b""),
    ]
    before = sorted(tmp_path.rglob("*"))
    source = TarSource(str(tar(tmp_path / "x.tar", members)))
    assert names(source) == ["up.png", "absolute.png", "empty.png"]
    assert source.ignored == {"link or device": 4, ".pkl": 1}
    assert source.read(0).shape == (3, 24, 32)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "x.tar"])
    with pytest.raises(ImageError, match=r"x.tar/empty.png: empty file"):
        source.read(2)


@pytest.mark.parametrize("cut", [100, 512 + 100, 1024 + 300])
def test_a_cut_shard_keeps_its_whole_members_and_says_so(tmp_path, cut):
    shard = tar(tmp_path / "x.tar", [("a.png", PNG), ("b.png", PNG * 20)])
    start = 512 + -(-len(PNG) // 512) * 512
    with shard.open("r+b") as file:
        file.truncate(start + cut)
    source = TarSource(str(shard))
    assert names(source) == ["a.png"]
    assert source.damaged
    assert source.read(0).shape == (3, 24, 32)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    shard = tar(tmp_path / "x.tar", [("a.png", PNG), ("b.png", PNG)])
    start = 512 + -(-len(PNG) // 512) * 512
    with shard.open("r+b") as file:
        file.seek(start + 148)
        file.write(b"9999999")
    source = TarSource(str(shard))
    assert names(source) == ["a.png"]
    assert f"damaged header at byte {start}" in source.damaged[0].reason


def test_impossible_sizes_are_named_not_believed(tmp_path):
    huge = tarfile.TarInfo("huge.png")
    huge.size = 1 << 40
    shard = tar(tmp_path / "x.tar", [("a.png", PNG)])
    with shard.open("r+b") as file:
        file.seek(512 + -(-len(PNG) // 512) * 512)
        file.write(huge.tobuf())
    source = TarSource(str(shard))
    assert names(source) == ["a.png"]
    assert "huge.png" in source.damaged[0].path


@pytest.mark.parametrize("size", [1 << 40, -512])
def test_a_name_of_impossible_length_is_refused(tmp_path, size):
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, size
    shard = tar(tmp_path / "x.tar", [("a.png", PNG)])
    with shard.open("r+b") as file:
        file.seek(512 + -(-len(PNG) // 512) * 512)
        file.write(name.tobuf(tarfile.GNU_FORMAT))
    source = TarSource(str(shard))
    assert names(source) == ["a.png"]
    assert len(source.damaged) == 1


def test_a_shard_that_vanishes_is_an_image_error(tmp_path):
    shard = tar(tmp_path / "x.tar", [("a.png", PNG)])
    source = TarSource(str(shard))
    shard.unlink()
    with pytest.raises(ImageError, match="No such file"):
        source.read(0)


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100, b"\x1f\x8b" + b"\0" * 2000])
def test_a_file_that_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match="0 images in 1 tar file"):
        open_source(str(tmp_path / "x.tar"))


def test_missing_shards_are_counted(tmp_path):
    tar(tmp_path / "x-0.tar", [("a.png", PNG)])
    with pytest.raises(UserError, match=r"2 of 3 tar files are missing, first .*x-1\.tar"):
        open_source(str(tmp_path / "x-{0..2}.tar"))


@pytest.mark.parametrize(
    ("pattern", "there", "option"),
    [
        ("x-{00..09}.tar", ("03", "04", "05", "08"), "'x-{03..05}.tar'"),
        ("x-{2..0}.tar", ("1", "0"), "x-1.tar"),
        ("x-{a,b}.tar", ("b",), "x-b.tar"),
    ],
)
def test_the_shards_that_are_there_are_named_where_others_lack(tmp_path, monkeypatch, pattern, there, option):
    monkeypatch.chdir(tmp_path)
    for number in there:
        tar(tmp_path / f"x-{number}.tar", [("a.png", PNG)])
    with pytest.raises(UserError) as mistake:
        open_source(pattern)
    assert mistake.value.hint == f"--data {option}"
    assert len(open_source(option.strip("'"))[0]) > 0


def test_without_any_shard_the_folder_is_to_be_looked_at(tmp_path):
    with pytest.raises(UserError) as mistake:
        open_source(str(tmp_path / "x-{0..2}.tar"))
    assert mistake.value.hint == f"ls {tmp_path}"


# Mistakes


def test_a_mistyped_folder_is_told_its_neighbours(tmp_path, monkeypatch):
    touch(tmp_path, "photos/a.png", "phone/a.png", "zebra/a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as mistake:
        open_source("photoz")
    assert mistake.value.error == "--data photoz: no such folder"
    assert mistake.value.hint.startswith("--data photos        (found here: photos/, phone/)")


def test_a_mistake_in_the_middle_of_a_path_is_found(tmp_path):
    touch(tmp_path, "datasets/photos/a.png")
    with pytest.raises(UserError) as mistake:
        open_source(f"{tmp_path}/dataset/photos")
    assert mistake.value.hint.startswith(f"--data {tmp_path}/datasets  ")


def test_a_folder_without_images_says_what_it_found(tmp_path):
    touch(tmp_path, "a/1.heic", "a/2.heic", "b/notes.txt")
    with pytest.raises(UserError) as mistake:
        open_source(str(tmp_path))
    assert mistake.value.error == f"--data {tmp_path}: 0 images in 3 folders"
    assert mistake.value.why.startswith("found .heic 2, .txt 1; readable types are jpg jpeg")


def test_a_folder_of_shards_says_how_to_name_them(tmp_path):
    tar(tmp_path / "train-0000.tar", [("a.png", PNG)])
    with pytest.raises(UserError) as mistake:
        open_source(str(tmp_path))
    assert mistake.value.hint == f"--data {tmp_path}/train-0000.tar"


def test_an_archive_is_refused(tmp_path):
    touch(tmp_path, "photos.zip")
    with pytest.raises(UserError, match=r"photos\.zip is a file of another type"):
        open_source(str(tmp_path / "photos.zip"))


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("cube.h5", "HDF5"),
        ("scene.zarr/.zarray", "Zarr"),
        ("brain.nii", "NIfTI"),
        ("brain.v2.nii.gz", "NIfTI"),
        ("night.FITS", "FITS"),
        ("stack.czi", "the format of a microscope"),
    ],
)
def test_numbers_in_containers_are_refused_by_name_with_the_way_out(tmp_path, name, called):
    """As the file, as the folder that is one, and in a folder."""
    touch(tmp_path, name)
    for place in (tmp_path / name.partition("/")[0], tmp_path):
        with pytest.raises(UserError) as mistake:
            open_source(str(place))
        assert mistake.value.hint.startswith("a TIFF or .npy file for each image"), place
        assert f"{called} is not read" in str(mistake.value), place

"""``tools/features.py``: a row for every readable image, class and patch features, names beside them."""

import json
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import mim
from mim.cli import main
from mim.transfer.features import Extraction

QUICK = ["--num_workers", "0", "--encode_batch", "4"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Nested images, two of which cannot be read, in a working folder of one's own."""
    generator = np.random.default_rng(0)
    for name in ("b/2.png", "b/1.png", "a.png", "c/d/5.png", "c/6.png"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), np.uint8)).save(file)
    (tmp_path / "photos" / "b" / "3.png").write_bytes(b"")
    (tmp_path / "photos" / "c" / "7.jpg").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


READABLE = ["photos/a.png", "photos/b/1.png", "photos/b/2.png", "photos/c/6.png", "photos/c/d/5.png"]


def read(kind, to):
    return np.load(f"features/{kind}.npy") if to == "npy" else load_file(f"features/{kind}.safetensors")[kind]


@pytest.mark.parametrize("to", ["safetensors", "npy"])
def test_rows_are_the_features_of_the_named_images(to, folder, weights):
    assert main("features", ["--weights", weights, "--data", "photos", "--to", to, *QUICK]) == 0
    names = (folder / "features" / "names.txt").read_text().splitlines()
    expected = mim.features(weights, names)
    assert names == READABLE
    assert read("patch", to).shape == (5, 4, 4, 64)
    np.testing.assert_allclose(read("class", to), expected.vectors, rtol=0, atol=1e-5)
    np.testing.assert_allclose(read("patch", to), expected.patches, rtol=0, atol=1e-5)


def test_unreadable_files_are_named_skipped_and_counted(folder, weights, capsys):
    assert main("features", ["--weights", weights, "--data", "photos", *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "warning: photos/b/3.png cannot be read (empty file) - skipped" in printed
    assert "  skipped 2 unreadable files, listed in features/bad_files.txt" in printed
    bad = (folder / "features" / "bad_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in bad] == ["photos/b/3.png", "photos/c/7.jpg"]
    facts = json.loads((folder / "features" / "features.json").read_text())
    assert (facts["images"], facts["unreadable"], facts["order"]) == (5, 2, "as in names.txt")
    assert facts["shapes"] == {"class": [5, 64], "patch": [5, 4, 4, 64]}


def test_too_many_unreadable_files_end_it_if_a_limit_is_given(folder, weights, capsys):
    assert main("features", ["--weights", weights, "--data", "photos", "--max_bad", "0.2", *QUICK]) == 2
    assert "2 of 7 images are unreadable" in capsys.readouterr().err
    assert not (folder / "features" / "class.safetensors").exists()


def test_half_precision_takes_half_the_room_and_patches_can_be_left_out(folder, weights):
    args = ["--dtype", "float16", "--patch", "false", "--pool", "mean", "--layers", "2"]
    assert main("features", ["--weights", weights, "--data", "photos", *args, *QUICK]) == 0
    assert read("class", "safetensors").dtype == np.float16
    assert read("class", "safetensors").shape == (5, 128)
    assert not (folder / "features" / "patch.safetensors").exists()


def test_a_second_call_replaces_the_first_and_nothing_of_anybody_else(folder, weights, capsys):
    assert main("features", ["--weights", weights, "--data", "photos", "--to", "npy", *QUICK]) == 0
    assert main("features", ["--weights", weights, "--data", "photos/b", *QUICK]) == 0
    assert sorted(file.name for file in (folder / "features").iterdir()) == [
        "bad_files.txt",
        "class.safetensors",
        "features.json",
        "names.txt",
        "patch.safetensors",
    ]
    assert main("features", ["--weights", weights, "--data", "photos", "--out", "photos", *QUICK]) == 2
    assert "--out photos holds other files" in capsys.readouterr().err


def test_images_apart_come_after_those_to_learn_from(folder, weights):
    (folder / "photos").rename(folder / "val")
    for number in (1, 2):
        (folder / "set" / "train").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(folder / "set" / "train" / f"{number}.png")
    (folder / "val").rename(folder / "set" / "val")
    assert main("features", ["--weights", weights, "--data", "set", "--patch", "false", *QUICK]) == 0
    names = (folder / "features" / "names.txt").read_text().splitlines()
    assert names == ["set/train/1.png", "set/train/2.png", *(n.replace("photos", "set/val") for n in READABLE)]


def test_features_leave_memory_when_they_are_written(folder, weights, monkeypatch):
    given, encoded = [], Extraction._encoded

    def watched(self, names, images):
        assert sum(patches() is not None for patches in given) <= 1  # of the batch before, which is being let go of
        rows = encoded(self, names, images)
        given.append(weakref.ref(rows.patches))
        return rows

    monkeypatch.setattr(Extraction, "_encoded", watched)
    args = ["--weights", weights, "--data", "photos", "--num_workers", "0", "--encode_batch", "1"]
    assert main("features", args) == 0
    assert len(given) == 5


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--layers", "99"], "--pool cls --layers 99: 99 layers cannot be read"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU here"),
        (["--data", "photos/b/3"], "--data photos/b/3: no such folder"),
        (["--out", "photos/a.png/x"], "--out photos/a.png/x cannot be written"),
    ],
)
def test_a_mistake_ends_in_three_lines(args, error, folder, weights, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main("features", ["--weights", weights, "--data", "photos", *QUICK, *args]) == 2
    assert capsys.readouterr().err.startswith(f"error: {error}")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_encoded(folder, weights, capsys, monkeypatch):
    monkeypatch.setattr("mim.commands.features.free_bytes", lambda path: 1000)
    assert main("features", ["--weights", weights, "--data", "photos", *QUICK]) == 2
    assert "are free" in capsys.readouterr().err
    assert not (folder / "features").exists()


def test_nothing_readable_is_a_mistake(folder, weights, capsys):
    for file in (folder / "photos").rglob("*.png"):
        file.write_bytes(b"")
    assert main("features", ["--weights", weights, "--data", "photos", *QUICK]) == 2
    assert "none of the 7 images can be read" in capsys.readouterr().err
    assert "empty file" in (folder / "features" / "bad_files.txt").read_text()

"""What is going to be written is tried before the work, and the trial leaves nothing behind."""

import os

import pytest

from mim.errors import UserError
from mim.options.outputs import check_file, check_folder, check_picture


@pytest.mark.parametrize("name", ["new", "old/new/newer"])
def test_a_place_with_room_is_left_as_it_was(tmp_path, name):
    (tmp_path / "old").mkdir()
    check_folder("--out", tmp_path / name)
    check_picture("--out", tmp_path / name / "x.PNG")
    assert os.listdir(tmp_path) == ["old"]
    assert not os.listdir(tmp_path / "old")


def test_a_file_that_will_be_replaced_stays_until_then(tmp_path):
    (tmp_path / "x.png").write_text("old")
    check_picture("--out", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_text() == "old"


@pytest.mark.parametrize(
    ("check", "name"),
    [
        (check_folder, "file"),
        (check_folder, "file/below"),
        (check_folder, "x" * 300),
        (check_file, "file/below"),
        (check_file, "."),
        (check_picture, "x.nope"),
        (check_picture, "x"),
        (check_picture, "x.pdf.gz"),
    ],
)
def test_a_place_without_room_is_refused(tmp_path, check, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out"):
        check("--out", tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]

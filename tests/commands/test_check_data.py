from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mim.commands.check_data import run
from mim.data.sources import open_source
from mim.errors import UserError


@pytest.fixture
def photos(tmp_path):
    """Six images of two classes, one of them broken."""
    for number in range(6):
        file = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 300 if number else 60, 3), (255, 0, 51), np.uint8)).save(file)
    (tmp_path / "photos" / "dog" / "5.png").write_bytes(b"broken")
    (tmp_path / "photos" / "dog" / "notes.txt").touch()
    return tmp_path / "photos"


def test_the_table_says_what_the_images_are_like(photos, tmp_path, capsys):
    run(str(photos), out=tmp_path / "sheet.png")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == f"{photos}: 6 images, 2 classes, read 6"
    assert "formats PNG 5" in lines
    assert "modes RGB 5, read as 3 channels" in lines
    assert "width 60 to 300, median 300" in lines
    assert f"shorter 32 to 63 {'#' * 40} 5" in lines
    assert "mean 1.000 0.000 0.200" in lines
    assert "std 0.000 0.000 0.000" in lines
    assert "ignored .txt 1" in lines
    assert "bad 1 (16.7%)" in lines
    assert any(line.startswith(f"{photos}/dog/5.png: damaged, or not of a readable format") for line in lines)


def test_the_sheet_shows_the_good_images(photos, tmp_path):
    run(str(photos), out=tmp_path / "new" / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    assert sheet.shape == (104, 504, 3)
    assert (sheet[10, 10] == (255, 0, 51)).all()


def test_the_fixed_list_is_taken_back_with_its_labels(photos, tmp_path):
    fixed = tmp_path / "lists" / "good.csv"
    run(str(photos), sample=1, fix=fixed, out=tmp_path / "sheet.png")
    source, _ = open_source(str(fixed))
    assert [Path(source.describe(index)).name for index in range(5)] == ["0.png", "2.png", "4.png", "1.png", "3.png"]
    assert (source.classes, source.labels) == (["cat", "dog"], [0, 0, 0, 1, 1])
    assert source.read(4).shape == (3, 40, 300)


def test_a_sample_reads_no_more(photos, tmp_path, capsys):
    run(str(photos), sample=2, out=tmp_path / "sheet.png")
    assert "read 2" in capsys.readouterr().out


def test_the_held_out_part_is_looked_at_too(photos, tmp_path, capsys):
    photos.rename(tmp_path / "train")
    Path(tmp_path / "val" / "cat").mkdir(parents=True)
    Image.new("L", (9, 9)).save(tmp_path / "val" / "cat" / "1.png")
    Path(tmp_path / "val" / "dog").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "val" / "dog" / "1.png")
    run(str(tmp_path), out=tmp_path / "sheet.png")
    assert f"{tmp_path}, held out: 2 images, 2 classes, read 2" in capsys.readouterr().out


def test_images_of_many_channels_have_a_sheet(tmp_path, capsys):
    (tmp_path / "bands").mkdir()
    np.save(tmp_path / "bands" / "a.npy", np.full((20, 30, 5), 51, np.uint8))
    run(str(tmp_path / "bands"), channels=5, out=tmp_path / "sheet.png")
    assert "0.200 0.200 0.200 0.200 0.200" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").exists()


def test_a_list_must_be_a_table(photos, tmp_path):
    with pytest.raises(UserError, match=r"good\.txt is not a \.csv file"):
        run(str(photos), fix=tmp_path / "good.txt")

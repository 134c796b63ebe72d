from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mim.commands.check_data import run
from mim.data.pixels import parse_bands
from mim.data.sources import open_source
from mim.errors import UserError
from mim.options.pretraining import translate
from mim.run.config import parse


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
    assert "1.000 1.000 1.000 1.000 1.000" in capsys.readouterr().out  # on the scale that was found
    assert (tmp_path / "sheet.png").exists()


def test_a_list_must_be_a_table(photos, tmp_path):
    with pytest.raises(UserError, match=r"good\.txt is not a \.csv file"):
        run(str(photos), fix=tmp_path / "good.txt")


def test_measurements_are_told_with_their_range_and_the_options_to_copy(tmp_path, capsys):
    (tmp_path / "scans").mkdir()
    for number in range(8):
        values = np.random.default_rng(number).integers(148, 3100, (40, 40, 1)).astype(np.float32)
        values[:4] = np.nan
        np.save(tmp_path / "scans" / f"{number}.npy", values)
    run(str(tmp_path / "scans"), channels=1, out=tmp_path / "sheet.png")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "types float32 8" in lines
    assert "nodata 10.0% of the pixels" in lines
    assert any(line.startswith("values 15") and "0.1 and 99.9 %" in line for line in lines)
    (options,) = (line for line in lines if line.startswith("options"))
    assert "--value_range 15" in options
    assert "--in_chans 1 --data.mean [0." in options
    assert not any(line.startswith("warning") for line in lines)
    assert Image.open(tmp_path / "sheet_values.png").size == (512, 60)


def test_what_makes_a_training_worse_is_warned_of(tmp_path, capsys):
    (tmp_path / "scans").mkdir()
    for number in range(8):
        values = np.random.default_rng(number).integers(100, 3000, (40, 40, 1)).astype(np.uint16)
        values = values * 20 + 5 if number == 0 else values // 200 if number == 1 else values
        np.save(tmp_path / "scans" / f"{number}.npy", np.full_like(values, 7) if number == 2 else values)
    np.save(tmp_path / "scans" / "8.npy", np.ones((40, 40, 1), np.float32))
    (tmp_path / "scans" / "9.npy").write_bytes((tmp_path / "scans" / "3.npy").read_bytes())
    Image.new("I;16", (40, 40), 9).save(
        tmp_path / "scans" / "a.tif", save_all=True, append_images=[Image.new("I;16", (40, 40))] * 2
    )
    run(str(tmp_path / "scans"), channels=1, out=tmp_path / "sheet.png")
    warned = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("warning")]
    told = " ".join(warned)
    for what in ("1 of 11 files hold another type than uint16", "scales differ", "nearly one colour", "fewer than 32"):
        assert what in told
    assert "1 files have 3 pages, the first is read" in told
    assert "1 of 11 files are copies of others" in told


def test_a_wrong_number_of_channels_in_all_files_is_one_error(tmp_path):
    (tmp_path / "bands").mkdir()
    np.save(tmp_path / "bands" / "a.npy", np.zeros((20, 30, 5), np.uint16))
    with pytest.raises(UserError, match="the images have 5 channels") as mistake:
        run(str(tmp_path / "bands"), out=tmp_path / "sheet.png")
    assert "--channels 5" in str(mistake.value)


READINGS = {
    "plain": {},
    "bands": {"bands": "4,1"},
    "nodata": {"nodata": -9999.0},
    "windows": {"windows": 32},
    "windows apart": {"windows": 32, "stride": 16, "bands": "3", "nodata": 0.5},
}


@pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
def test_the_options_that_are_printed_make_a_training_read_as_the_check_did(reading, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("scenes").mkdir()
    np.save("scenes/a.npy", np.random.default_rng(0).normal(-20, 5, (48, 64, 4)).astype(np.float32))
    run("scenes", channels=4, out=tmp_path / "sheet.png", **reading)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[0] == "options"]
    data = parse(translate([*line.split()[1:], "--data", "scenes"])).data
    bands, grid = reading.get("bands"), (reading.get("windows"), reading.get("stride"))
    assert (data.nodata, (data.windows, data.stride)) == (reading.get("nodata"), grid)
    assert parse_bands(data.bands) == parse_bands(bands)
    assert len(data.mean) == (len(parse_bands(bands)) or 4)

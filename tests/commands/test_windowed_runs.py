"""Rasters that are too large to be read whole: looked at, trained on in windows, and gone on with."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from strikes import checkpoints, differences

import mim
from mim.cli import main

TINY = Path(__file__).parents[1] / "tiny.yaml"
SMALL = ["--epochs", "2", "--batch_size", "8", "--eval_every", "9", "--save_every", "0.5", "--pictures", "2"]


@pytest.fixture
def scenes(tmp_path):
    """Two scenes of two bands, in tiles and as an array, a third of one of them nodata: 24 windows of 64 x 64."""
    rng = np.random.default_rng(0)
    (tmp_path / "scenes").mkdir()
    values = rng.integers(148, 3100, (256, 192, 2)).astype(np.uint16)
    values[:, :64] = 0
    np.save(tmp_path / "scenes" / "a.npy", values)
    bands = rng.integers(148, 3100, (2, 250, 180)).astype(np.uint16)
    tiles = {"tile": (64, 64), "compression": "lzw", "photometric": "minisblack", "planarconfig": "separate"}
    tifffile.imwrite(tmp_path / "scenes" / "b.tif", bands, **tiles)
    return tmp_path / "scenes"


def train(out, *args):
    return main("pretrain", ["--config", str(TINY), "--out", str(out), "--in_chans", "2", *SMALL, *map(str, args)])


@pytest.mark.middle
def test_a_run_on_windows_resumes_to_the_same_bits_and_keeps_its_grid(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole, part = tmp_path / "whole", tmp_path / "part"
    given = ["--data", scenes, "--windows", 64, "--nodata", 0]
    assert train(whole, *given) == 0
    said = capsys.readouterr().out
    assert f"{scenes}: 24 windows, no labels" in said
    assert "2 of 2 images are cut into windows of 64x64: 24 in all" in said
    assert "17% of the windows are nodata: others are taken in their place" in said
    assert yaml.safe_load((whole / "config.yaml").read_text())["data"]["windows"] == 64
    assert not (whole / "bad_files.txt").exists()
    shutil.copytree(whole, part, symlinks=True)
    for checkpoint in checkpoints(part)[1:]:
        checkpoint.unlink()
    assert main("pretrain", ["--resume", str(part), "--num_workers", "2"]) == 0
    assert differences(whole, part) == []
    assert main("pretrain", ["--resume", str(part), "--windows", "32"]) == 2
    assert "data.windows" in capsys.readouterr().err


def test_check_data_counts_windows_and_the_list_that_it_writes_can_be_trained_on(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (scenes / "c.tif").write_bytes(b"II*\0")
    look = ["--data", str(scenes), "--channels", "2", "--windows", "64", "--stride", "32", "--nodata", "0"]
    assert main("check_data", [*look, "--fix", "good.csv"]) == 0
    said = capsys.readouterr().out
    assert f"{scenes}: 70 windows, no labels, read 70" in said
    assert "2 of 2 images are cut into windows of 64x64, 32 apart: 70 in all" in said
    assert "7 of 70 windows are nodata and are passed over in training" in said
    assert f"{scenes}/c.tif: " in said
    assert len(Path("good.csv").read_text().splitlines()) == 3
    run = mim.pretrain(
        data="good.csv", config=TINY, windows=64, in_chans=2, epochs=1, batch_size=8, out="run", pictures=0
    )
    assert run.summary["images"] == 24


@pytest.mark.parametrize("command", ["knn", "linear_probe", "finetune", "segment", "visualize", "features"])
def test_commands_without_windows_say_so(command, capsys):
    assert main(command, ["--weights", "test_vit", "--data", "shapes", "--windows", "64"]) == 2
    assert "--windows" in capsys.readouterr().err


LARGE = """
import sys, resource, torch
from mim.data.pretrain import PretrainData
torch.set_num_threads(1)
data = PretrainData(sys.argv[1], windows=512, batch_size=64)
data.open((32, 32), 3, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data.check()
for step in range(3):
    data.batch(step)
print(len(data.source), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tiles", "strips", "array"])
def test_ten_scenes_of_20000_x_20000_are_read_in_bounded_memory(layout, tmp_path):
    """Sparse files: 1.2 GB each to whoever reads them whole."""
    for number in range(10):
        file, shape = tmp_path / f"{number}.{'npy' if layout == 'array' else 'tif'}", (20_000, 20_000, 3)
        if layout == "array":
            np.lib.format.open_memmap(file, "w+", np.uint8, shape)
            continue
        form = {"tile": (256, 256)} if layout == "tiles" else {"rowsperstrip": 1}
        tifffile.imwrite(file, shape=shape, dtype=np.uint8, photometric="rgb", **form)
    process = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, check=True)
    windows, kib = map(int, process.stdout.split())
    assert windows == 10 * 40 * 40
    assert kib < 400 * 1024


@pytest.mark.parametrize("command", ["knn", "linear_probe", "finetune", "segment", "visualize", "features"])
def test_commands_that_read_whole_images_say_what_windows_are_for(command, capsys):
    assert main(command, ["--windows", "512"]) == 2
    error = capsys.readouterr().err
    assert "--windows is for pretraining and check_data" in error
    assert "--data TILES" in error

"""Mistakes in the settings of a run: each ends in three lines that name it, before a step is made or a folder left."""

import time
from pathlib import Path

import pytest
from PIL import Image

from mim.cli import main

TINY = str(Path(__file__).parents[1] / "tiny.yaml")
MODEL = "--model.init_args."
MISTAKES = {
    "data that is not there": (["--data", "nowhere"], "nowhere"),
    "a folder without images": (["--data", "empty"], "empty"),
    "an empty list": (["--data", "empty.csv"], "empty.csv"),
    "a list of files that are not there": (["--data", "lost.csv"], "lost.csv"),
    "a file that is no data set": (["--data", "text.md"], "text.md"),
    "a shard that is none": (["--data", "broken.tar"], "broken.tar"),
    "shards that are not there": (["--data", "train-{0..9}.tar"], "train-0.tar"),
    "one bad image of nine": (["--data", "rotten"], "bad.png"),
    "classes that differ between train and val": (["--data", "classes"], "classes"),
    "an output that is a file": (["--out", "text.md"], "text.md"),
    "an output in a place without room for files": (["--out", "/proc/run"], "/proc/run"),
    "an output that holds a run": (["--out", "done"], "done"),
    "a run to resume that is not there": (["--resume", "nowhere"], "nowhere"),
    "weights that are not there": (["--init", "nowhere.pth"], "nowhere.pth"),
    "weights that are none": (["--init", "text.md"], "text.md"),
    "an image size that does not divide": (["--img_size", "30"], "30"),
    "a patch larger than the image": (["--patch_size", "64"], "64"),
    "a negative image size": (["--img_size", "-32"], "-32"),
    "a model that timm has not": (["--model", "vit_enormous"], "vit_enormous"),
    "a model that is no ViT": (["--model", "resnet18"], "resnet18"),
    "a method that is none": (["--method", "maee"], "maee"),
    "a ratio above one": (["--mask_ratio", "1.5"], "1.5"),
    "a ratio of nothing": (["--mask_ratio", "0"], "--mask_ratio"),
    "a policy for another method": ([MODEL + "masking", "AttentionMasking"], "guid"),
    "heads that do not divide the width": ([MODEL + "decoder_heads", "5"], "5"),
    "a batch of nothing": (["--batch_size", "0"], "batch_size"),
    "a batch that does not divide": (["--batch_size", "15", "--accumulate", "2"], "batch_size 15"),
    "no epochs": (["--epochs", "0"], "epochs"),
    "a learning rate below zero": (["--blr", "-1"], "blr"),
    "a rate that is no number": (["--blr", "fast"], "fast"),
    "a share of bad files above one": (["--max_bad", "2"], "max_bad"),
    "a negative number of workers": (["--num_workers", "-1"], "num_workers"),
    "a precision that is none": (["--precision", "12-bit"], "12-bit"),
    "a strategy that is none": (["--strategy", "fsdpp"], "fsdpp"),
    "no devices": (["--devices", "0"], "devices"),
    "an accelerator that is not here": (["--trainer.accelerator", "tpu"], "--trainer.accelerator"),
    "statistics for other channels": (["--data.mean", "[0.5]", "--data.std", "[0.5]"], "3 channels"),
    "a config that is not there": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "an option that there is not": (["--epohcs", "3"], "epochs"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with everything that a mistake may point to."""
    monkeypatch.chdir(tmp_path)
    image = Image.new("RGB", (40, 40))
    for folder in ("empty", "rotten", "classes/train/a", "classes/train/b", "classes/val/a", "classes/val/c", "done"):
        Path(folder).mkdir(parents=True)
    for number in range(8):
        image.save(f"rotten/{number}.png")
    Path("rotten/bad.png").write_bytes(Path("rotten/0.png").read_bytes()[:60])
    for folder in Path("classes").glob("*/*"):
        image.save(folder / "0.png")
    Path("empty.csv").write_text("")
    Path("lost.csv").write_text("one.png\ntwo.png\n")
    Path("text.md").write_text("# A text\n")
    Path("broken.tar").write_bytes(b"no tar" * 200)
    Path("done/config.yaml").write_text("{}")
    return sorted(tmp_path.rglob("*"))


@pytest.mark.parametrize(("args", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_in_three_lines_that_name_it(args, named, place, tmp_path, capsys):
    config = [] if "--config" in args or "--method" in args else ["--config", TINY]
    began = time.process_time()
    assert main("pretrain", [*config, *args]) == 2
    assert time.process_time() - began < 5
    text = capsys.readouterr().err
    heads = [line.split(":")[0] for line in text.splitlines() if not line.startswith("         ")]
    assert heads in (["error"], ["error", "try"], ["error", "why"], ["error", "why", "try"]), text
    assert named in text
    assert sorted(tmp_path.rglob("*")) == place  # nothing is left behind

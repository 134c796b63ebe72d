"""Mistakes on the command line: each ends in three lines that name it, before a step is made or a folder left."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mim.cli import main

TINY = str(Path(__file__).parents[1] / "tiny.yaml")
MODEL = "--model.init_args."
VIEWS = "--data.views.init_args."
SMALL = ["--data", "rotten"]
REDUCED = ["--reduction", "tome", "--model", "test_vit", "--rounds", "1"]
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
    "a ratio of nothing": (["--mask_ratio", "0"], "ratio=0"),
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
    "an option that there is not": (["--epohcs", "3"], "--epohcs"),
    "fewer devices than none": (["--devices", "-1"], "--devices"),
    "devices by number on a CPU": (["--devices", "[0,1]"], "--devices"),
    "a seed beyond all generators": (["--seed", "9" * 23], "--seed"),
    "more threads than any machine has": (["--threads", "100000"], "--threads"),
    "no channels": (["--in_chans", "0"], "--in_chans"),
    "fewer channels than none": (["--in_chans", "-1"], "--in_chans"),
    "an image of no size": (["--img_size", "0"], "--img_size"),
    "an image of more patches than fit": (["--img_size", "1000000"], "--img_size"),
    "a patch of no size": (["--patch_size", "0"], "--patch_size"),
    "a negative patch": (["--patch_size", "-8"], "--patch_size"),
    "lines at no steps": (["--log_every", "0"], "--log_every cannot be 0"),
    "fewer pictures than none": (["--pictures", "-1"], "--pictures"),
    "a decoder without blocks": ([MODEL + "decoder_depth", "0"], "decoder_depth cannot be 0"),
    "crops from large to small": (["--data.views", "SingleView", VIEWS + "scale", "[0.9,0.2]"], VIEWS + "scale"),
    "crops larger than their image": (["--data.views", "SingleView", VIEWS + "scale", "[0.1,2]"], "scale"),
    "a flip more often than always": (["--data.views", "SingleView", VIEWS + "flip", "3"], "flip"),
    "small crops that do not divide": (["--data.views", "MultiCrop", VIEWS + "local_size", "30"], "local_size 30"),
    "fewer small crops than none": (["--data.views", "MultiCrop", VIEWS + "local_crops", "-1"], "local_crops"),
    "a blur without a width": (["--data.views", "MultiCrop", VIEWS + "blur", "[0,0]"], "blur"),
    "blocks that are always dropped": ([MODEL + "encoder.drop_path_rate", "2"], "drop_path_rate"),
    "a model without blocks": ([MODEL + "encoder.kwargs", "{depth: 0}"], "no blocks"),
    "gradients cut to less than nothing": (["--trainer.gradient_clip_val", "-1"], "gradient_clip_val"),
    "no micro-batches": (["--accumulate", "0"], "--accumulate"),
    "data by a name that no disk takes": (["--data", "x" * 5000], "--data"),
    "an output by a name that no disk takes": (["--out", "x" * 5000], "--out"),
    "a run by a name that no disk takes": (["--resume", "x" * 5000], "--resume"),
    "weights by a name that no disk takes": (["--init", "x" * 5000], "--init"),
    "ten million shards": (["--data", "train-{0..9999999}.tar"], "10,000,000 tar files"),
    "a hundred million shards": (["--data", "train-{0..9999}-{0..9999}.tar"], "100,000,000 tar files"),
    "a run whose settings are lost": (["--resume", "done"], "done/config.yaml"),
}
EVALUATIONS = {
    "knn: no image": ("knn", ["--img_size", "0"], "--img_size"),
    "knn: no neighbours": ("knn", ["--k", "[]"], "--k"),
    "knn: neighbours below one": ("knn", ["--k", "[10,0]"], "--k"),
    "knn: seeds below none": ("knn", ["--seeds", "-1"], "--seeds"),
    "knn: loaders below none": ("knn", ["--num_workers", "-1"], "--num_workers"),
    "knn: an output that is a file": ("knn", ["--out", "text.md"], "--out"),
    "linear_probe: no rates": ("linear_probe", ["--lrs", "[]"], "--lrs"),
    "linear_probe: crops below none": ("linear_probe", ["--crops", "-1"], "--crops"),
    "linear_probe: a batch of one": ("linear_probe", ["--batch_size", "1"], "--batch_size"),
    "finetune: a batch of nothing": ("finetune", ["--batch_size", "0"], "--batch_size"),
    "finetune: loaders below none": ("finetune", ["--num_workers", "-1"], "--num_workers"),
    "finetune: blocks that are always dropped": ("finetune", ["--drop_path", "1"], "--drop_path"),
    "finetune: a drop path above one": ("finetune", ["--drop_path", "2"], "--drop_path"),
    "finetune: mixup below none": ("finetune", ["--mixup", "-1"], "--mixup"),
    "finetune: looks at negative times": ("finetune", ["--eval_every", "-1"], "--eval_every"),
    "finetune: rates below zero": ("finetune", ["--layer_decay", "-1"], "--layer_decay"),
    "finetune: crops from large to small": ("finetune", ["--scale", "[1,0.5]"], "--scale"),
    "finetune: an end before its start": ("finetune", ["--anneal", "[0.5,0.1]"], "--anneal"),
    "finetune: an output that is a file": ("finetune", ["--out", "text.md"], "--out"),
    "segment: a batch of nothing": ("segment", ["--batch_size", "0"], "--batch_size"),
    "segment: a crop of no size": ("segment", ["--crop", "0"], "--crop"),
    "segment: images of no size": ("segment", ["--scale", "[0,0]"], "--scale"),
    "segment: images from large to small": ("segment", ["--scale", "[2,1]"], "--scale"),
    "segment: no blocks": ("segment", ["--taps", "[]"], "--taps"),
    "segment: no neighbours": ("segment", ["--head", "knn", "--k", "0"], "--k"),
    "segment: nothing to vote": ("segment", ["--head", "knn", "--bank", "0"], "--bank"),
    "segment: pictures below none": ("segment", ["--pictures", "-1"], "--pictures"),
    "segment: a warm-up below none": ("segment", ["--warmup_steps", "-1"], "--warmup_steps"),
    "segment: loaders below none": ("segment", ["--num_workers", "-1"], "--num_workers"),
    "segment: an output that is a file": ("segment", ["--out", "text.md"], "--out"),
    "visualize: no image": ("visualize", ["--img_size", "0"], "--img_size"),
    "visualize: a picture below a file": ("visualize", ["--out", "text.md/x.png"], "--out"),
    "visualize: a picture of no format": ("visualize", ["--out", "x.nope"], "--out"),
    "export: a folder below a file": ("export", ["--out", "text.md/x"], "--out"),
    "export: a graph in the place of a folder": ("export", ["--to", "onnx", "--out", "empty"], "--out"),
}
"""Commands that look into weights, which these are given."""
OTHERS = {
    "export: a run that is not there": ("export", ["--run", "nowhere"], "--run nowhere"),
    "export: a run whose settings are lost": ("export", ["--run", "done"], "done/config.yaml"),
    "compare: an output that is a file": ("compare", ["--methods", "mae", "--out", "text.md"], "--out"),
    "compare: an output without room": ("compare", ["--methods", "mae", "--out", "/proc/x"], "--out"),
    "check_data: no data": ("check_data", [], "--data"),
    "check_data: a sheet below a file": ("check_data", [*SMALL, "--out", "text.md/x.png"], "--out"),
    "check_data: a sheet of no format": ("check_data", [*SMALL, "--out", "x.nope"], "--out"),
    "check_data: a sheet without a name": ("check_data", [*SMALL, "--out", "empty"], "--out"),
    "check_data: a sheet in the place of a folder": ("check_data", [*SMALL, "--out", "sheets.png"], "--out"),
    "check_data: a list below a file": ("check_data", [*SMALL, "--fix", "text.md/x.csv"], "--fix"),
    "check_data: a list without room": ("check_data", [*SMALL, "--fix", "/proc/x.csv"], "--fix"),
    "make_shapes: an output that is a file": ("make_shapes", ["--out", "text.md"], "--out"),
    "make_shapes: an output without room": ("make_shapes", ["--out", "/proc/x"], "--out"),
    "make_shapes: images below none": ("make_shapes", ["--out", "new", "--train", "-1"], "--train"),
    "make_shapes: images of no size": ("make_shapes", ["--out", "new", "--size", "0"], "--size"),
    "benchmark: loader processes without images": ("benchmark", ["--num_workers", "2"], "--num_workers"),
    "benchmark_reduction: shares that are none": ("benchmark_reduction", [*REDUCED, "--shares", "2,-1"], "--shares"),
    "benchmark_reduction: numbers below a file": (
        "benchmark_reduction",
        [*REDUCED, "--json", "text.md/x.json"],
        "--json",
    ),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with everything that a mistake may point to."""
    monkeypatch.chdir(tmp_path)
    image = Image.new("RGB", (40, 40))
    for folder in (
        "empty",
        "rotten",
        "classes/train/a",
        "classes/train/b",
        "classes/val/a",
        "classes/val/c",
        "done",
        "sheets.png",
    ):
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


@pytest.fixture
def mistake(place, tmp_path, capsys):
    """Makes one, expects three lines, early, that name it, and nothing left behind."""

    def make(command, args, named):
        began = time.process_time()
        assert main(command, args) == 2
        assert time.process_time() - began < 5
        text = capsys.readouterr().err
        heads = [line.split(":")[0] for line in text.splitlines() if not line.startswith("         ")]
        assert heads in (["error"], ["error", "try"], ["error", "why"], ["error", "why", "try"]), text
        assert named in text.partition("try:")[0]
        assert sorted(tmp_path.rglob("*")) == place
        return text

    return make


@pytest.mark.parametrize(
    ("config", "option", "value"),
    [
        ("tiny-ibot.yaml", "head.prototypes", "0"),
        ("tiny-ibot.yaml", "teacher.momentum", "100"),
        ("tiny-ibot.yaml", "teacher.temperature", "-1"),
        ("tiny-ibot.yaml", "freeze_epochs", "-1"),
        ("tiny_hpm.yaml", "difficulty.momentum", "[0.9,2]"),
        ("tiny_hpm.yaml", "difficulty.units", "0"),
    ],
)
def test_a_setting_of_a_teacher_that_is_out_of_range_is_named(config, option, value, mistake):
    args = ["--config", TINY.replace("tiny.yaml", config), MODEL + option, value, "--out", "new"]
    mistake("pretrain", args, f"--model.{option} cannot be ")


def test_a_disk_without_room_for_the_checkpoints_ends_in_three_lines(mistake, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    mistake("pretrain", ["--config", TINY, "--out", "new"], "--out new: checkpoints need")


@pytest.mark.parametrize(("args", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_in_three_lines_that_name_it(args, named, mistake):
    config = [] if "--config" in args or "--method" in args else ["--config", TINY]
    mistake("pretrain", [*config, *args], named)


@pytest.mark.parametrize(("command", "args", "named"), EVALUATIONS.values(), ids=EVALUATIONS)
def test_a_mistake_with_weights_ends_in_three_lines_that_name_it(command, args, named, mistake, weights):
    mistake(command, ["--weights", weights, *args], named)


@pytest.mark.parametrize(("command", "args", "named"), OTHERS.values(), ids=OTHERS)
def test_a_mistake_in_any_other_command_ends_in_three_lines_that_name_it(command, args, named, mistake):
    mistake(command, args, named)


def test_data_that_is_not_there_is_not_answered_with_data_that_the_command_refuses(mistake):
    text = mistake("check_data", ["--data", "nowhere"], "--data nowhere")
    assert "leave --data out" not in text
    assert "make_shapes" in text

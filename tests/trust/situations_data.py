"""Commands refused for their images, weights or reduction: each call makes one mistake in the folder of :func:`lay`.

``WEIGHTS`` stands for an exported encoder, ``GREY`` for one of one channel, ``BARE`` for one without a class token,
``CONV`` for a conv net.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from situations import FINETUNE, KNN, RUN, image, png, tar

CHECK = ["check_data", "--data"]
IMAGES = ["knn", "--weights", "WEIGHTS", "--num_workers", "0", "--seeds", "0", "--device", "cpu", "--data"]
ONE_EPOCH = ["--num_workers", "0", "--batch_size", "2", "--epochs", "1", "--warmup_epochs", "0", "--device", "cpu"]
MASKS = ["segment", "--weights", "WEIGHTS", "--num_workers", "0", "--steps", "1", "--device", "cpu", "--data"]
INIT = [*RUN, "--data", "photos", "--init"]
TOKENS = ["pretrain", "--method", "maskgit", "--model", "test_vit", "--img_size", "32", "--data"]
TABLES = {
    "a list.csv": "path,label\nphotos/0.png,a\nphotos/1.png,a\nphotos/2.png,b\nphotos/3.png,b\n",
    "one class.csv": "path,label\nphotos/0.png,a\nphotos/1.png,a\n",
    "minus.csv": "path,the label\n" + "".join(f"photos/{n}.png,{n // 2 - 1}\n" for n in range(6)),
    "rows.csv": "path,the row\n" + "".join(f"photos/{n % 6}.png,{n}\n" for n in range(100)),
    "all bad.csv": "path,label\n" + "".join(f"bad/{n}.png,{n % 2}\n" for n in range(6)),
    "bad/0.png": "",
    "tuned/export": "",
    "below it/lost.csv": "path\nphotos/0.png\n",
    "in photos/list.csv": "path,label\na0.png,a\na1.png,a\nb0.png,b\nb1.png,b\n",
    "foreign.yaml": "reduction: {class_path: nowhere.Shorter}\n",
    "broken tokens/tokens.json": "{}",
}
"""Files by name; blanks in names tell hints that a shell would take apart."""


def lay(weights):
    """Folders, tables, tar files and weights, most with one thing wrong."""
    for number in range(6):
        image(f"photos/{number}.png")
    for name in ("a/0", "a/1", "b/0", "b/1"):
        image(f"in photos/{name.replace('/', '')}.png")
        image(f"in pieces/part_{name}.png")
        image(f"in parts/train/{name}.png")
        image(f"in parts/val/{name.replace('/', '')}.png")
        for part in ("train", "val"):
            image(f"cities/leftImg8bit/{part}/{name[0]}chen/{name[2]}_leftImg8bit.png")
        draw(f"grey/{name}.png", 90)
        draw(f"deep/{name}.png", 90 << 6)
    for name, text in TABLES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    for number in range(1, 6):
        shutil.copy("bad/0.png", f"bad/{number}.png")
    for name in ("tar files", "zeros"):
        Path(name).mkdir()
    for number in range(2):
        tar(f"some-{number}.tar", {"a.png": png()})
        shutil.copy("some-0.tar", f"tar files/shard-0{number}.tar")
    tar("several.tar", {"a.png": png(), "a.json": b'{"label": [1, 2]}', "b.png": png(), "b.json": b'{"label": [1]}'})
    for name, values in {"masks": (0, 1), "three": (1, 2), "alone": (3, 3)}.items():
        for pair in ("train/{}/0", "train/{}/1", "val/{}/0", "other/{}/0"):
            image(f"in {name}/{pair.format('images')}.png", (32, 32))
            draw(f"in {name}/{pair.format('masks')}.png", *values)
    shutil.copytree("in masks/train", "colours")
    image("colours/masks/0.png", (32, 32))
    shutil.copytree("in masks/train/images", "voc/JPEGImages")
    shutil.copytree("in masks/train/masks", "voc/SegmentationClass")
    for name in ("train", "other list"):
        Path("voc/ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        Path(f"voc/ImageSets/Segmentation/{name}.txt").write_text("0\n1\n")
    np.save("zeros/0.npy", np.zeros((40, 40, 3), np.float32))
    shutil.copytree(weights, "a run/export/backbone")
    Path("a run/config.yaml").write_text("{}")
    with Path("a run/export/backbone/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")


def draw(path, left, right=None):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((32, 32), left, np.uint8 if left < 256 else np.uint16)
    pixels[:, 16:] = left if right is None else right
    Image.fromarray(pixels).save(path)


DATA = {
    "pretrain: bands that files have not": [*RUN, "--data", "photos", "--bands", "5,4,3"],
    "pretrain: bands for another model": [*RUN, "--data", "photos", "--bands", "3,1"],
    "pretrain: channels of built-in images": [*RUN, "--in_chans", "1"],
    "pretrain: ranges of other channels": [*RUN, "--data", "photos", "--value_range", "[[0,1],[0,2]]"],
    "pretrain: logarithms of nothing": [*RUN, "--data", "zeros", "--log_values"],
    "knn: labels of built-in images": [*IMAGES, "builtin", "--label_column", "1"],
    "knn: numbered pieces": [*IMAGES, "in pieces"],
    "knn: one class": [*IMAGES, "one class.csv"],
    "knn: no labels": [*IMAGES, "photos"],
    "knn: a list beside images": [*IMAGES, "in photos"],
    "knn: labels in one part": [*IMAGES, "in parts"],
    "knn: several labels in a tar file": [*IMAGES, "several.tar"],
    "knn: cities": [*IMAGES, "cities"],
    "knn: a number for each row": [*IMAGES, "rows.csv"],
    "knn: minus one": [*IMAGES, "minus.csv"],
    "knn: a column that is not there": [*IMAGES, "a list.csv", "--label_column", "age"],
    "knn: a list in another folder": [*IMAGES, "below it/lost.csv"],
    "pretrain: a folder of tar files": [*RUN, "--data", "tar files"],
    "pretrain: shards that are missing": [*RUN, "--data", "some-{0..3}.tar"],
    "pretrain: a pattern that is none": [*RUN, "--data", "some-{0..1.tar"],
    "pretrain: an archive of the web": [*RUN, "--data", "https://nowhere.invalid/a.zip"],
    "pretrain: shards of no server": [*RUN, "--data", "http://127.0.0.1:9/a.tar"],
    "pretrain: broken tokens": [*RUN, "--data", "broken tokens"],
    "check_data: a list of members": [*CHECK, "some-0.tar", "--fix", "good.csv"],
    "check_data: a list that is no table": [*CHECK, "photos", "--fix", "the good.txt"],
    "pretrain: windows of 3 px": [*RUN, "--data", "photos", "--data.windows", "3"],
    "pretrain: windows that stand still": [*RUN, "--data", "photos", "--windows", "64", "--data.stride", "0"],
    "pretrain: windows on scales of their own": [
        *[*RUN, "--data", "photos", "--windows", "32"],
        *["--value_range", "per_file"],
    ],
    "segment: masks of the web": [*MASKS, "https://nowhere.invalid/a.tar"],
    "segment: no folder": [*MASKS, "nowhere"],
    "segment: no masks": [*MASKS, "photos"],
    "segment: masks of one class": [*MASKS, "in alone"],
    "segment: too few classes": [*MASKS, "in three", "--num_classes", "2"],
    "segment: too many classes": [*MASKS, "in masks", "--num_classes", "5"],
    "segment: a part that is not there": [*MASKS, "in masks", "--split", "nowhere"],
    "segment: a list that is not there": [*MASKS, "voc"],
    "segment: masks in colours": [*MASKS, "colours"],
    "knn: no such reduction": [*KNN, "--reduction", "evitt"],
    "knn: nothing like a reduction": [*KNN, "--reduction", "qqqqqq"],
    "knn: a reduction that is trained": [*KNN, "--reduction", "cropr"],
    "knn: a reduction trained with masks": [*KNN, "--reduction", "dtop"],
    "knn: a reduction without a value": [*KNN, "--reduction", "evit:5"],
    "knn: a reduction that asks the class token": ["knn", "--weights", "BARE", "--reduction", "evit"],
    "knn: a conv net's tokens": ["knn", "--weights", "CONV", "--reduction", "evit"],
    "knn: a folder without a reduction": [*KNN, "--reduction", "photos"],
    "knn: a reduction of a package": [*KNN, "--reduction", "foreign.yaml"],
    "tokens: a tokenizer that is not there": ["tokens", "encode", "--data", "photos", "--tokenizer", "nowhere"],
    "tokens: a tokenizer that is none": ["tokens", "encode", "--data", "photos", "--tokenizer", "a list.csv"],
    "maskgit: grey images": [*TOKENS, "grey", "--in_chans", "1"],
    "maskgit: patches of another size": [*TOKENS, "photos", "--img_size", "48", "--patch_size", "6"],
    "maskgit: a tokenizer that is none": [
        *TOKENS,
        "photos",
        "--model.init_args.target.init_args.tokenizer",
        "a list.csv",
    ],
    "export: other files": ["export", "--weights", "WEIGHTS", "--out", "in photos"],
    "pretrain: weights of other heads": [*INIT, "WEIGHTS", "--model.init_args.encoder.kwargs", "{num_heads: 4}"],
    "pretrain: weights of one channel": [*INIT, "GREY"],
    "pretrain: weights without a class token": [*INIT, "BARE"],
    "knn: damaged weights": ["knn", "--weights", "a run/export/backbone"],
}
LATE = {
    "finetune: a policy that timm has not": [*FINETUNE, *ONE_EPOCH, "--auto_augment", "nonsense"],
    "finetune: no class token": ["finetune", "--weights", "BARE", *ONE_EPOCH, "--data", "grey", "--pool", "cls"],
    "finetune: a policy for grey images": ["finetune", "--weights", "GREY", *ONE_EPOCH, "--data", "grey"],
    "finetune: a policy for grey images, told by a process": [
        *["finetune", "--weights", "GREY", *ONE_EPOCH[2:], "--data", "grey"],
        *["--num_workers", "1"],
    ],
    "knn: a cache below a file": [*IMAGES, "a list.csv", "--cache", "a list.csv/x"],
    "finetune: a file in the place of its export": [
        *["finetune", "--weights", "WEIGHTS", *ONE_EPOCH, "--data", "a list.csv"],
        *["--from_scratch", "false", "--out", "tuned"],
    ],
    "knn: no image that can be read": [*IMAGES, "all bad.csv", "--max_bad", "1"],
    "pretrain: more channels than files have": [*RUN, "--data", "photos", "--in_chans", "4"],
}
"""Told when the work has begun."""
FORCED = {
    "pretrain: too many windows": (
        "mim.data.windows.MAX_WINDOWS",
        50,
        [*RUN, "--data", "photos", "--windows", "32", "--stride", "1"],
    ),
    "knn: a full disk": (
        "mim.evaluation.bank.shutil.disk_usage",
        lambda path: SimpleNamespace(free=2**40 * ("full" not in str(path))),
        [*IMAGES, "a list.csv", "--cache", "full"],
    ),
}
"""What a test has to change for it: a name, its value and the call."""

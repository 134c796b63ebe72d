"""Commands refused for their options: each call makes one mistake; ``WEIGHTS`` stands for an exported encoder."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

TINY = str(Path(__file__).parents[1] / "tiny.yaml")
RUN = ["pretrain", "--config", TINY]
KNN = ["knn", "--weights", "WEIGHTS"]
FINETUNE = ["finetune", "--weights", "WEIGHTS", "--data", "builtin"]
SEGMENT = ["segment", "--weights", "WEIGHTS", "--data", "builtin"]


def image(path, size=(40, 40), grey=90, **saving):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path)) + grey).integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise + np.uint8(grey)).save(path, **saving)


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "PNG")
    return buffer.getvalue()


PLAIN = {
    "cli: a plugin without a name": [*RUN, "--plugin"],
    "cli: an option of another command": [*KNN, "--mixup", "0.8"],
    "benchmark: a GPU that is not here": ["benchmark", "--config", TINY, "--device", "cuda"],
    "benchmark: no plain DINOv2": [
        "benchmark",
        "--config",
        "dinov2/demo",
        "--batch_size",
        "2",
        "--against",
        "plain",
        "--device",
        "cpu",
    ],
    "benchmark: recipes of its own": ["benchmark", "--gpu_report", "--model", "test_vit"],
    "pretrain: a profile of more than the run": [*RUN, "--profile", "1000"],
    "pretrain: two weights to start from": [*RUN, "--continue", "WEIGHTS", "--init", "WEIGHTS"],
    "pretrain: the scale of earlier versions, cut": [*RUN, "--value_range", "per_file", "--clip"],
    "pretrain: logarithms of it": [*RUN, "--value_range", "per_file", "--log_values"],
    "pretrain: a range of nothing": [*RUN, "--value_range", "5"],
    "pretrain: logarithms of 0": [*RUN, "--value_range", "0,5", "--log_values"],
    "pretrain: bands from 0": [*RUN, "--bands", "0,1"],
    "pretrain: additions to random weights": [*RUN, "--lora", "4"],
    "pretrain: a ratio under two names": [
        *RUN,
        "--mask_ratio",
        "0.6",
        "--model.init_args.masking.init_args.ratio",
        "0.7",
    ],
    "pretrain: a policy without a ratio": [
        *RUN,
        "--mask_ratio",
        "0.6",
        "--model.init_args.masking",
        "MultiBlockMasking",
    ],
    "pretrain: a distance of no windows": [*RUN, "--stride", "32"],
    "pretrain: windows of 3 px": [*RUN, "--data", "photos", "--windows", "3"],
    "pretrain: windows of built-in images": [*RUN, "--windows", "64"],
    "pretrain: a package that is a path": [*RUN, "--plugin", "folder/part.py"],
    "pretrain: a package that is not there": [*RUN, "--plugin", "not_there_at_all"],
    "pretrain: a page of the web": [*RUN, "--data", "https://nowhere.invalid/a.zip"],
    "pretrain: an unknown protocol": [*RUN, "--data", "gopher://nowhere.invalid/a.tar"],
    "pretrain: a config of another method": ["pretrain", "--config", "mae/demo", "--method", "ibot"],
    "spark: an image of no whole places": ["pretrain", "--method", "spark", "--model", "resnet18", "--img_size", "50"],
    "spark: a net of another family": ["pretrain", "--method", "spark", "--model", "vgg11"],
    "mae: all patches hidden": [*RUN, "--mask_ratio", "0.999"],
    "mae: squares that do not divide the image": [
        *RUN,
        "--model.init_args.masking",
        "GridMasking",
        "--model.init_args.masking.init_args.cell",
        "3",
    ],
    "tokenunify: a stem that looks beyond patches": [
        "pretrain",
        "--method",
        "tokenunify",
        "--model",
        "vit_small_r26_s32_224",
    ],
    "mp3: positions": ["pretrain", "--method", "mp3", "--model.init_args.encoder.kwargs", "{}"],
    "cli: a word behind a switch": [*RUN, "--compile", "maybe"],
    "knn: a share above one": [*KNN, "--max_bad", "2"],
    "finetune: a teacher of nothing": [*FINETUNE, "--teacher", "WEIGHTS"],
    "finetune: a teacher that is no folder": [*FINETUNE, "--reduction", "evit", "--teacher", "nowhere"],
    "finetune: another kind of teacher": [*FINETUNE, "--reduction", "evit", "--teacher", "WEIGHTS"],
    "finetune: fewer tokens beside a memory": [*FINETUNE, "--memory", "2", "--pool", "cls", "--reduction", "evit"],
    "sample: classes of given images": ["sample", "--run", "backbone", "--hide", "middle", "--classes", "3"],
    "segment: a part of built-in masks": [*SEGMENT, "--split", "val"],
    "segment: a stride above the crop": [*SEGMENT, "--crop", "48", "--stride", "64"],
    "visualize: two pictures": ["visualize", "--weights", "WEIGHTS", "--reduction", "evit", "--policy", "random"],
    "spark: layers that look around": ["pretrain", "--method", "spark", "--model", "seresnet50"],
}
"""In a folder with photos, a tar file of photos and a text."""

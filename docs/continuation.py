"""What going on from one's own weights gives on CIFAR-10, ``{train,test}/CLASS/*.jpg``: the study of docs/backbones.md.

    OMP_NUM_THREADS=1 python docs/continuation.py CIFAR10 OUT

A small DINOv3 learns by MAE from five of the classes, once; the other five then count, with three seeds. Rows are
appended to OUT/scores.csv as they come, and those that are there are not measured again.
"""

import csv
import sys
import time
from itertools import product
from pathlib import Path

import torch

import mim
from mim.evaluation.bank import Bank
from mim.evaluation.knn import knn_accuracy
from mim.evaluation.logistic import linear_accuracy
from mim.evaluation.rate_selection import probe_head
from mim.options.classification import ProbeRecipe
from mim.run.weights import untrained_encoder

HALVES = {
    "first": ("airplane", "automobile", "bird", "cat", "deer"),
    "second": ("dog", "frog", "horse", "ship", "truck"),
}
ENCODER, OPTIM = "model.init_args.encoder", "model.init_args.optim"
SMALL = {f"{ENCODER}.positions": "learned", f"{ENCODER}.kwargs": '{"embed_dim": 96, "depth": 4, "num_heads": 4}'}
SMALL |= {"model.init_args.decoder_width": 64}
GENTLY = {f"{OPTIM}.blr": 2e-3, f"{OPTIM}.layer_decay": 0.75, f"{OPTIM}.head_warmup": 0.1}
VARIANTS = {
    "scratch": ("", {}),
    "continued": ("continue_", GENTLY),
    "continued, no head warm-up": ("continue_", GENTLY | {f"{OPTIM}.head_warmup": 0.0}),
    "continued, L2 anchor 0.01": ("continue_", GENTLY | {f"{OPTIM}.anchor.weights": 0.01}),
    "recipe of scratch, from the start": ("init", {}),
    "continued, gram anchor 1": ("continue_", GENTLY | {f"{OPTIM}.anchor.gram": 1.0}),
}
PARTS = ("learn", "score")
ATTENTIVE = ProbeRecipe(head="attentive", lrs=(1e-3,), epochs=10, warmup_epochs=1)


def lists(images: Path, out: Path) -> None:
    """Files of either half: all of them to learn from without labels, some of each class to be measured on."""
    for half, classes in HALVES.items():
        for part, name, most in (("train", "all", None), ("train", "learn", 1000), ("test", "score", None)):
            files = [path for kind in classes for path in sorted((images / part / kind).iterdir())[:most]]
            (out / f"{half}-{name}.txt").write_text("".join(f"{path.resolve()}\n" for path in files))


def pretrained(out: Path, name: str, half: str, epochs: float, seed: int, **options) -> mim.Run:
    """A run on all images of a half; one that has finished is taken as it is."""
    folder, settings = out / f"{name}-{seed}", SMALL | options.pop("settings", {})
    if (folder / "export").is_dir():
        return mim.Run(folder)
    common = {"config": "mae/vit_micro_patch8_32-cifar10", "model": "vit_small_patch16_dinov3", "overwrite": True}
    common |= {"seed": seed, "num_workers": 0, "threads": 1, "pictures": 0, "eval_every": 99.0}
    return mim.pretrain(out / f"{half}-all.txt", epochs=epochs, out=folder, settings=settings, **common, **options)


def features(encoder: mim.Loaded, half: str, part: str, out: Path) -> tuple[torch.Tensor, ...]:
    """Pooled features, patch tokens and labels of a list."""
    found = mim.features(encoder, out / f"{half}-{part}.txt", pool="mean")
    labels = torch.tensor([HALVES[half].index(Path(name).parent.name) for name in found.names])
    return found.vectors, found.patches.flatten(1, 2), labels


def measured(encoder: mim.Loaded, out: Path, seed: int) -> list[float]:
    """Three probes of the second half's classes, and k-NN of the first half's, for what has been forgotten."""
    scores = []
    for half in ("second", "first"):
        (bank, tokens, known), (queries, asked, truth) = (features(encoder, half, part, out) for part in PARTS)
        scores.append(knn_accuracy(bank, known, queries, truth))
        if half == "second":
            scores.append(linear_accuracy(bank, known, queries, truth))
            scores.append(probe_head([Bank(tokens, known)], Bank(asked, truth), ATTENTIVE, 5, seed).top1)
    return scores


def encoder_of(name: str, seed: int, out: Path) -> mim.Loaded:
    """Trains what a row of the table stands for, unless that is there already."""
    start = pretrained(out, "start", "first", 3.0, seed=0)
    if name in ("untrained", "start"):
        encoder = mim.load(start)
        return encoder if name == "start" else encoder._replace(encoder=untrained_encoder(str(start.path), seed))
    door, settings = VARIANTS[name]
    weights = {door: start} if door else {}
    folder = "-".join(name.replace(",", "").split())
    return mim.load(pretrained(out, folder, "second", 1.0, seed, settings=settings, **weights))


def main(images: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lists(images, out)
    table = out / "scores.csv"
    done = [row[:2] for row in csv.reader(table.open())] if table.is_file() else []
    for name, seed in [("start", 0), *product(("untrained", *VARIANTS), range(3))]:
        if [name, str(seed)] not in done:
            began = time.process_time()
            scores = measured(encoder_of(name, seed, out), out, seed)
            with table.open("a") as file:
                seconds = time.process_time() - began
                csv.writer(file).writerow([name, seed, *(f"{score:.4f}" for score in scores), round(seconds)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))

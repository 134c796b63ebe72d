"""Every method and masking policy on CIFAR-10, ``{train,test}/CLASS/*``: the table of docs/log/methods.md.

    OMP_NUM_THREADS=1 python docs/cifar10_table.py CIFAR10 OUT

All of them train the ViT of the demos (width 128, 4 blocks, 48 px in patches of 8 px: 0.8 M parameters) on the 50,000
training images without labels, by the demo's recipe of the method, for the same number of image views. Rows are
appended to OUT/scores.csv as they come, and those that are there are not measured again: stop it and start it as you
like. Seed 0 of all rows comes first, then the seeds of the best.
"""

import csv
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import mim
from mim.evaluation.bank import Bank
from mim.evaluation.knn import knn_accuracy
from mim.evaluation.logistic import linear_accuracy
from mim.evaluation.rate_selection import probe_head
from mim.options.classification import ProbeRecipe
from mim.run.weights import untrained_encoder

VIEWS = 100_000  # of 48 px; those of 24 px count a quarter
LEARNT, SCORED = 1_000, 1_000  # training images of each class that the probes learn from, test images that score them
SEEDS, BEST = 3, 5
ATTENTIVE = ProbeRecipe(head="attentive", lrs=(1e-3,), epochs=10, warmup_epochs=1)
COLUMNS = ("name", "seed", "20-NN", "linear", "attentive", "20-NN of the class token", "CPU seconds")
MODEL = "model.init_args"
Settings = Mapping[str, Any]


class Row(NamedTuple):
    """A recipe and what differs from it; ``views`` is how many views of 48 px the method sees of an image."""

    config: str
    settings: Settings = MappingProxyType({})
    views: float = 1
    untrained: str = "fixed positions"


def masks(policy: str, **settings: object) -> Settings:
    """Another masking policy."""
    chosen = {f"{MODEL}.masking.init_args.{name}": value for name, value in settings.items()}
    return {f"{MODEL}.masking": policy} | chosen


PIXELS, HINT = "mae/demo-pixels", "momentum_mae/demo"
CROPS = 2 + 2 / 4
ROWS = {
    "MAE, pixels": Row(PIXELS),
    "MAE, edges (HOG)": Row("mae/demo"),
    "iBOT": Row("ibot/demo", views=CROPS, untrained="learned positions"),
    "HPM": Row("hpm/demo"),
    "SimMIM, pixels": Row("simmim/demo", untrained="learned positions"),
    "AttMask": Row("attmask/demo", views=CROPS, untrained="learned positions"),
    "DINOv2's parts": Row("dinov2/demo", views=CROPS, untrained="registers"),
    "I-JEPA": Row("ijepa/demo", untrained="no class token"),
    "DTM": Row("dtm/demo", untrained="learned positions"),
    "MP3": Row("mp3/demo", untrained="no positions"),
    "AdaMAE": Row("adamae/demo"),
    "CAPI": Row("capi/demo", untrained="registers"),
    "SimMIM, edges (HOG)": Row("simmim/demo", {f"{MODEL}.target": "HOGTarget"}, untrained="learned positions"),
    "I-JEPA with StoP": Row("ijepa/demo", {f"{MODEL}.stop": 0.25}, untrained="no class token"),
    "MAE, CrossMAE's decoder": Row(PIXELS, {f"{MODEL}.cross": '{"predicted": 0.33, "mixed": 4}'}),
    "MAE, squares of 2 x 2": Row(PIXELS, masks("GridMasking", ratio=0.75, cell=2)),
    "MAE, a rectangle visible": Row(PIXELS, masks("RectangleMasking", ratio=0.75, inverse=True, rolled=True)),
    "MAE, AttMask's hint": Row(HINT),
    "MAE, A-CLIP's kept squares": Row(HINT, masks("AttentionKeepMasking", ratio=0.75, cell=2)),
    "iBOT, random masks": Row(
        "ibot/demo", masks("VaryingRandomMasking", low=0.1, high=0.5), views=CROPS, untrained="learned positions"
    ),
    "DropPos": Row("mp3/demo", {f"{MODEL}.positions.smoothing": 1.0}, untrained="no positions"),
}
UNTRAINED = {row.untrained: name for name, row in reversed(ROWS.items())}


def pretrained(name: str, images: Path, out: Path, seed: int) -> mim.Run:
    """A run; one that has finished is taken as it is, one that was stopped goes on."""
    folder, row = out / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}", ROWS[name]
    if (folder / "export").is_dir():
        return mim.Run(folder)
    if (folder / "checkpoints").is_dir():
        return mim.pretrain(resume=folder)
    epochs = VIEWS / 50_000 / row.views
    settings = {f"{MODEL}.optim.warmup_epochs": 0.1 * epochs} | row.settings
    if row.views > 1:
        settings |= {f"{MODEL}.freeze_epochs": 0.05 * epochs}
    return mim.pretrain(
        images / "train", config=row.config, out=folder, epochs=epochs, seed=seed, settings=settings,
        num_workers=0, threads=1, pictures=0, eval_every=99.0, probe_images=100, overwrite=True,
    )  # fmt: skip


class Part(NamedTuple):
    """Frozen features: mean of patches ``(M, D)``, class token ``(M, D)`` or None, patches ``(M, N, D)``, labels."""

    mean: torch.Tensor
    token: torch.Tensor | None
    patches: torch.Tensor
    labels: torch.Tensor


def features(encoder: mim.Loaded, images: Path, part: str) -> Part:
    """Features of as many images of every class as are counted."""
    classes = sorted(folder.name for folder in (images / part).iterdir())
    most = LEARNT if part == "train" else SCORED
    files = [str(path) for kind in classes for path in sorted((images / part / kind).iterdir())[:most]]
    has_token = encoder.encoder.vit.has_class_token
    found = mim.features(encoder, files, pool="cls" if has_token else "mean", batch_size=250)
    patches = found.patches.flatten(1, 2)
    labels = torch.tensor([classes.index(Path(name).parent.name) for name in files])
    return Part(patches.mean(1), found.vectors if has_token else None, patches, labels)


def measured(encoder: mim.Loaded, images: Path, seed: int) -> list[str]:
    """Three probes of the mean of patches, and k-NN of the class token where there is one."""
    learn, score = features(encoder, images, "train"), features(encoder, images, "test")
    scores = [probe(learn.mean, learn.labels, score.mean, score.labels) for probe in (knn_accuracy, linear_accuracy)]
    banks = [Bank(learn.patches, learn.labels)], Bank(score.patches, score.labels)
    scores.append(probe_head(*banks, ATTENTIVE, 10, seed).top1)
    if learn.token is not None and score.token is not None:
        scores.append(knn_accuracy(learn.token, learn.labels, score.token, score.labels))
    return [f"{score:.4f}" for score in scores] + [""] * (4 - len(scores))


def measure(name: str, seed: int, images: Path, out: Path) -> list[Any]:
    """A row of the table: an untrained encoder or a pretrained one."""
    began = time.process_time()
    kind = name.removeprefix("untrained, ")
    run = pretrained(UNTRAINED.get(kind, kind), images, out, 0 if kind in UNTRAINED else seed)
    seconds = time.process_time() - began
    encoder = mim.load(run)
    if kind in UNTRAINED:
        encoder = encoder._replace(encoder=untrained_encoder(str(run.path), seed))
    return [name, seed, *measured(encoder, images, seed), "" if kind in UNTRAINED else round(seconds)]


def read(table: Path) -> list[dict[str, str]]:
    """The rows that are there."""
    return list(csv.DictReader(table.open())) if table.is_file() else []


def best(rows: list[dict[str, str]]) -> list[str]:
    """The rows of highest mean of k-NN and linear probe with seed 0."""
    first = [row for row in rows if row["seed"] == "0" and row["name"] in ROWS]
    return [row["name"] for row in sorted(first, key=lambda row: -float(row["20-NN"]) - float(row["linear"]))[:BEST]]


def page(rows: list[dict[str, str]]) -> str:
    """The table in Markdown: mean and standard deviation over pretraining seeds, best linear probe first."""
    lines = ["| " + " | ".join(("", "seeds", *COLUMNS[2:])) + " |", "|" + "---|" * (len(COLUMNS))]
    groups = {name: [row for row in rows if row["name"] == name] for name in dict.fromkeys(r["name"] for r in rows)}
    for name, group in sorted(groups.items(), key=lambda item: -mean(float(row["linear"]) for row in item[1])):
        cells = [_cell([row[column] for row in group]) for column in COLUMNS[2:-1]]
        seconds = [float(row["CPU seconds"]) for row in group if row["CPU seconds"]]
        cells.append(f"{mean(seconds):.0f}" if seconds else "")
        lines.append("| " + " | ".join((name, str(len(group)), *cells)) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[str]) -> str:
    numbers = [100 * float(value) for value in values if value]
    if not numbers:
        return ""
    return f"{mean(numbers):.1f}" + (f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else "")


def main(images: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    table = out / "scores.csv"
    for seed in range(SEEDS):
        names = list(ROWS) if seed == 0 else best(read(table))
        for name in [*names, *(f"untrained, {kind}" for kind in UNTRAINED)]:
            if not any(row["name"] == name and row["seed"] == str(seed) for row in read(table)):
                cells = measure(name, seed, images, out)
                with table.open("a") as file:
                    writer = csv.writer(file)
                    if file.tell() == 0:
                        writer.writerow(COLUMNS)
                    writer.writerow(cells)
                print(*cells, flush=True)
    (out / "table.md").write_text(page(read(table)))
    print(page(read(table)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))

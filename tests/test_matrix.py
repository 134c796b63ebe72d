"""All that opens a run, on runs of every kind: channels, shapes, tokens and pools, pair by pair, in process.

Every number is compared with what the trained method itself gives, so that weights which were dropped or replaced on
the way cannot go unnoticed.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiers import fast

from mim.cli import main
from mim.commands import export, finetune, knn, linear_probe, pareto, pretrain, segment, visualize
from mim.data.pixels import EIGHT_BIT
from mim.data.pretrain import PretrainData
from mim.encoder import Encoder
from mim.errors import UserError
from mim.evaluation.bank import Bank
from mim.evaluation.features import Features, extract
from mim.evaluation.knn import knn_accuracy
from mim.evaluation.rate_selection import probe_head
from mim.options.classification import ClassificationOptions, FinetuneRecipe, ProbeRecipe
from mim.options.evaluation import TrainingOptions
from mim.options.segmentation import Scoring, SegmentationOptions, SegmentationRecipe
from mim.pictures.strips import strip
from mim.pictures.tokens import reduction_strip, states_of
from mim.reduction.files import build_reduction
from mim.report import write_report
from mim.run.comparison import collect, strips, tables
from mim.run.weights import load_encoder, load_method, untrained_encoder

CHANNELS = (1, 3, 4, 6)
SIZES = {"square": (16, 16), "wide": (16, 24)}
TOKENS = {"plain": {}, "registers": {"reg_tokens": 2}, "no class token": {"class_token": False, "global_pool": "avg"}}
POOLS = {"cls": "class token", "mean": "mean of patch tokens"}
KINDS = [
    kind
    for kind in itertools.product(CHANNELS, SIZES, TOKENS, POOLS)
    if not (kind[2] == "no class token" and kind[3] == "cls")
]
STILL = 1e-30  # a learning rate that moves no weight


def pairs(row: Sequence[object]) -> set[tuple[object, ...]]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


def covering(rows: Iterable[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Some of the rows in which every pair of values occurs that occurs in any of them, chosen greedily."""
    left = list(rows)
    missing, chosen = set().union(*map(pairs, left)), []
    while missing:
        best = max(left, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


RUNS = covering(KINDS)


@dataclass
class Trained:
    """A finished run, and what its method computes."""

    folder: Path
    data: str
    masks: str
    kind: tuple[int, str, str, str]

    def __post_init__(self) -> None:
        self.channels, self.shape, self.tokens, self.pool = self.kind
        self.method, data, config = load_method(self.folder)
        self.scale = {name: config.data[name] for name in ("value_range", "pixel_type")}
        self.encoder: Encoder = self.method.evaluated
        self.mean, self.std = data.statistics(self.channels)
        exported = data.pixels.exported(self.mean, self.std)  # as timm's transforms take them, which divide by 255
        self.told = exported["mean"], exported["std"]
        self.kernel = self.encoder.vit.patch_embed.proj.weight
        self.images = torch.rand(2, self.channels, *SIZES[self.shape], generator=torch.Generator().manual_seed(1))

    @property
    def weights(self) -> str:
        return str(self.folder)

    def options(self, **more: object) -> ClassificationOptions:
        return ClassificationOptions(
            self.weights, self.data, num_workers=0, device="cpu", cache=self.folder.parent / "features", **more
        )

    def middles(self, part: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        data = PretrainData(self.data, num_workers=0, mean=self.mean, std=self.std, **self.scale)
        data.open(SIZES[self.shape], self.channels, seed=0)
        source = data.source if part == "train" else data.evaluation
        return list(data.center_batches(source, range(len(source))))

    def banks(self, pool: str | None = None) -> tuple[Bank, Bank]:
        """Features of the trained method: to learn from, to be scored."""
        return tuple(Bank(*extract(self.encoder, self.middles(part), pool or self.pool)) for part in ("train", "val"))

    def results(self, name: str) -> dict:
        content = json.loads((self.folder / "evaluation" / name / "metrics.json").read_text())
        assert content["title"].replace("&", "&amp;") in (self.folder / "report.html").read_text()
        return content


def photos(root: Path, channels: int) -> None:
    """Class folders, 12 images to learn from and 4 to score of each of two classes, and a few images with masks."""
    noise = np.random.default_rng(channels)
    for part, count in (("train", 12), ("val", 4)):
        for number, name in itertools.product(range(count), ("dark", "light")):
            pixels = noise.integers(0, 200, (20, 28, channels), dtype=np.uint8) + (55 if name == "light" else 0)
            mask = np.zeros((20, 28), dtype=np.uint8)
            mask[:, 14:] = 1
            labels, images, masks = (root / way for way in (f"labels/{part}/{name}", f"{part}/images", f"{part}/masks"))
            for folder in (labels, images, masks):
                folder.mkdir(parents=True, exist_ok=True)
            np.save(labels / f"{number}.npy", pixels)
            if number < 2:
                np.save(images / f"{name}{number}.npy", pixels)
                Image.fromarray(mask).save(masks / f"{name}{number}.png")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, str, str, str]], Trained]:
    """Gives the run of a kind, trained for three steps when it is asked for first."""
    home = tmp_path_factory.mktemp("matrix")
    made: dict[tuple[int, str, str, str], Trained] = {}

    def run_of(kind: tuple[int, str, str, str]) -> Trained:
        channels, shape, tokens, pool = kind
        root, folder = home / f"images-{channels}", home / "-".join(map(str, kind)).replace(" ", "_")
        if not root.exists():
            photos(root, channels)
        if kind not in made:
            encoder = "--model.init_args.encoder."
            args = [f"--config={Path(__file__).with_name('tiny.yaml')}", f"--data.path={root / 'labels'}"]
            args += [f"{encoder}img_size={list(SIZES[shape])}", f"{encoder}in_chans={channels}"]
            args += [f"{encoder}kwargs={json.dumps({'depth': 2, **TOKENS[tokens]})}", f"{encoder}drop_path_rate=0"]
            args += ["--model.init_args.masking.init_args.ratio=0.5", "--data.batch_size=8", "--epochs=1"]
            args += [
                "--eval_every=1",
                "--save_every=1",
                "--pictures=1",
                "--probe_images=12",
                f"--pool={pool}",
                f"--out={folder}",
            ]
            assert pretrain.main([*args, "--trainer.accelerator=cpu"]) == 0
            made[kind] = Trained(folder, str(root / "labels"), str(root), kind)
        return made[kind]

    return run_of


def by_knn(run: Trained) -> None:
    knn.run(run.options(), k=(3,), seeds=0)  # untrained encoders: check_loaded
    (bank, queries), found = run.banks(), run.results("knn")
    assert found["metrics"]["3-NN top-1"] == [knn_accuracy(*bank, *queries, k=3)]
    assert found["pool"] == run.pool
    assert f"{POOLS[run.pool]} of the last block" in found["protocol"]


def by_knn_of_fewer_tokens(run: Trained) -> None:
    knn.run(run.options(reduction="tome:1"), k=(3,), seeds=0)
    run.encoder.reduction = build_reduction("tome:1", run.encoder.vit).eval()
    bank, queries = run.banks()
    run.encoder.reduction = None
    found = run.results("knn-tome-1")
    assert found["metrics"]["3-NN top-1"] == [knn_accuracy(*bank, *queries, k=3)]
    assert found["pool"] == run.pool


def by_a_linear_probe(run: Trained) -> None:
    recipe = ProbeRecipe(epochs=2, warmup_epochs=0, lrs=(0.1,), batch_size=8)
    linear_probe.run(run.options(), recipe, seeds=1)
    (bank, queries), found = run.banks(), run.results("linear")
    assert found["metrics"]["top-1"] == [probe_head([bank], queries, recipe, 2, seed=0).top1]
    assert found["pool"] == run.pool


def by_an_attentive_probe(run: Trained) -> None:
    recipe = ProbeRecipe(head="attentive", epochs=1, warmup_epochs=0, lrs=(0.01,), batch_size=8)
    linear_probe.run(run.options(), recipe, seeds=1)
    features, banks = Features(pool="tokens"), []
    for part in ("train", "val"):
        with torch.inference_mode():
            ((images, labels),) = run.middles(part)
            banks.append(Bank(features.of(run.encoder, images).half(), labels))
    found = run.results("attentive")
    assert found["metrics"]["top-1"] == [probe_head(banks[:1], banks[1], recipe, 2, seed=0).top1]
    assert found["pool"] == "tokens"


def by_fine_tuning(run: Trained) -> None:
    recipe = FinetuneRecipe(epochs=1, batch_size=8, blr=STILL, auto_augment="none", drop_path=0.0)
    finetune.run(run.options(), recipe, TrainingOptions(), from_scratch=False)
    found, exported = run.results("finetune"), load_encoder(str(run.folder / "evaluation" / "finetune" / "export"))
    assert found["pool"] == exported.pool == run.pool
    assert POOLS[run.pool] in found["protocol"]
    assert torch.equal(exported.encoder.vit.patch_embed.proj.weight, run.kernel)
    assert (exported.mean, exported.std) == run.told
    # With mean pooling the norm is a new one behind the pooling: what enters it is the trained encoder's.
    mine, theirs = (encoder.after_blocks(run.images, [1])[0].x for encoder in (run.encoder, exported.encoder))
    assert torch.equal(mine, theirs)


def by_segmentation(run: Trained, head: str = "knn", **recipe: object) -> None:
    crop = None if run.shape == "square" else 16
    options = SegmentationOptions(run.weights, run.masks, num_workers=0, device="cpu", crop=crop)
    asked = SegmentationRecipe(head=head, batch_size=2, **recipe)
    segment.run(options, asked, Scoring(pictures=1), TrainingOptions())
    found = run.results(f"segment-{head}")
    assert found["pool"] == "tokens"
    assert "on the patch tokens of block" in found["protocol"]
    assert 0 <= found["metrics"]["mIoU"][0] <= 1


def by_tuned_segmentation(run: Trained) -> None:
    by_segmentation(run, "linear", finetune=True, steps=1, lr=STILL, drop_path=0.0)
    exported = load_encoder(str(run.folder / "evaluation" / "segment-linear" / "export"))
    assert torch.equal(exported.encoder.vit.patch_embed.proj.weight, run.kernel)
    assert exported.pool == run.pool
    if run.shape == "square":
        assert torch.equal(exported.encoder(run.images), run.encoder(run.images))


def by_pictures(run: Trained) -> None:
    out = run.folder / "seen.png"
    visualize.run(run.weights, data=run.data, images=2, out=out)
    images = torch.cat([images for images, _ in run.middles("val")])[:: 8 // 2]
    assert_same_picture(out, strip(images, {}, run.encoder, *run.told))


def by_pictures_of_tokens(run: Trained) -> None:
    out = run.folder / "tokens.png"
    visualize.run(run.weights, data=run.data, reduction="tome:1", images=2, out=out)
    images = torch.cat([images for images, _ in run.middles("val")])[:: 8 // 2]
    run.encoder.reduction = build_reduction("tome:1", run.encoder.vit).eval()
    states = states_of(run.encoder, images, 5)
    run.encoder.reduction = None
    assert_same_picture(out, reduction_strip(images, states, run.encoder.patch_size, *run.told))


def by_pictures_of_masks(run: Trained) -> None:
    out = run.folder / "masks.png"
    visualize.run(run.weights, data=run.data, policy="all", images=2, out=out)
    columns = 2 + 5 if run.tokens != "no class token" else 1 + 2  # input and attention, then policies
    picture = Image.open(out)
    assert picture.width > columns * 96
    assert picture.width < (columns + 1) * (2 * 96)


def by_the_report(run: Trained) -> None:
    page = write_report(run.folder).read_text()
    probe = json.loads((run.folder / "summary.json").read_text())["probe"]
    for kind in ("knn", "linear"):
        mean = 100 * sum(probe[kind]["trained"]) / 3
        assert f'<dd>{mean:.1f}\u202f%</dd><dd class="note">{POOLS[run.pool]}, untrained' in page
        assert f"<strong>{mean:.1f} ±" in page  # headline and table
    assert f"frozen encoder, {POOLS[run.pool]}" in page


def by_the_export(run: Trained) -> None:
    out = run.folder.parent / f"{run.folder.name}-out"
    export.run(run=run.folder, out=out)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    tokens = run.encoder(run.images)
    assert torch.equal(model.forward_features(run.images), tokens)
    pooled = tokens[:, 0] if run.pool == "cls" else tokens[:, run.encoder.num_prefix :].mean(dim=1)
    pooled = run.encoder.vit.fc_norm(pooled)  # of models that are made with it
    assert torch.equal(model(run.images), pooled)
    export.run(weights=str(out), out=run.folder.parent / f"{run.folder.name}-again")
    again = load_encoder(str(run.folder.parent / f"{run.folder.name}-again"))
    assert torch.equal(again.encoder(run.images), tokens)
    assert again.pool == run.pool


def by_comparison(run: Trained) -> None:
    entries = collect([run.folder])
    head = tables(entries)[2][0]
    assert f"k-NN (run, {run.pool})" in head
    picture = strips(entries, 2)[run.folder.name]
    assert picture.height > 2 * 96


def by_accuracy_over_speed(run: Trained) -> None:
    pareto.run(
        run.weights, run.data, num_workers=0, reduction="tome", shares="0.9", rounds=1, batch_size=1, device="cpu"
    )
    (bank, queries), found = run.banks(), run.results("pareto")
    assert found["metrics"]["none"]["20-NN top-1"] == knn_accuracy(*bank, *queries, k=20)
    assert found["pool"] == run.pool
    assert f"20-NN: {POOLS[run.pool]} of the last block" in found["protocol"]


def check_loaded(run: Trained, weights: Path) -> None:
    loaded, untrained = load_encoder(str(weights)), untrained_encoder(str(weights), seed=0)
    assert torch.equal(loaded.encoder(run.images), run.encoder(run.images))
    assert (loaded.mean, loaded.std) == (run.told if loaded.pixels == EIGHT_BIT else (run.mean, run.std))
    assert loaded.pool == run.pool
    shapes = [{name: part.shape for name, part in e.vit.state_dict().items()} for e in (untrained, run.encoder)]
    assert shapes[0] == shapes[1]


def by_its_export(run: Trained) -> None:
    check_loaded(run, run.folder / "export" / "backbone")


def by_a_copy_of_its_export(run: Trained) -> None:
    check_loaded(run, shutil.copytree(run.folder / "export" / "backbone", "copy"))


def by_its_checkpoint(run: Trained) -> None:
    check_loaded(run, run.folder / "checkpoints" / "last.ckpt")


def by_the_run_before_its_end(run: Trained) -> None:
    leave = shutil.ignore_patterns("export", "evaluation", "tensorboard")
    check_loaded(run, shutil.copytree(run.folder, "unfinished", ignore=leave, symlinks=True))


ACTIVITIES = {name: activity for name, activity in list(globals().items()) if name.startswith("by_")}
ROWS = covering((name, *kind) for name in ACTIVITIES for kind in RUNS)


def on_few_runs() -> list[tuple[object, ...]]:
    """Some of the rows that hold every activity, on as few runs as a greedy choice finds."""
    left, chosen = set(ACTIVITIES), []
    while left:
        rows = max(([row for row in ROWS if row[1:] == kind and row[0] in left] for kind in RUNS), key=len)
        chosen += rows
        left -= {row[0] for row in rows}
    return chosen


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def assert_same_picture(path: Path, expected: Image.Image) -> None:
    with Image.open(path) as picture:
        shown, right = (np.asarray(each.convert("RGBA")).astype(int) for each in (picture, expected))
        assert abs(shown - right).max() <= 1  # images are normalised on another scale, and so rounded


@pytest.mark.parametrize("row", fast(ROWS, on_few_runs()), ids=lambda row: "-".join(map(str, row)).replace(" ", "_"))
def test_what_opens_a_run_measures_the_model_that_was_trained(row, run_of):
    ACTIVITIES[row[0]](run_of(row[1:]))


def test_a_graph_gives_the_tokens_of_the_trained_model(run_of, tmp_path):
    run = run_of(next(kind for kind in RUNS if kind[0] == 6 and kind[2] == "registers"))
    export.run(run=run.folder, out=tmp_path / "graph.pt2", to="torch-export")
    tokens = torch.export.load(tmp_path / "graph.pt2").module()(run.images)
    torch.testing.assert_close(tokens, run.encoder(run.images))


def test_every_pair_of_activity_channels_shape_tokens_and_pool_is_tried():
    everything = [(name, *kind) for name in ACTIVITIES for kind in KINDS]
    assert set().union(*map(pairs, ROWS)) == set().union(*map(pairs, everything))
    assert len(ROWS) < len(everything) / 4


@pytest.mark.parametrize("data", ["builtin", "shapes"])
def test_built_in_images_are_refused_for_other_channels(data, run_of, capsys):
    run = run_of(next(kind for kind in RUNS if kind[0] == 4 and kind[1] == "square"))
    for command in ("knn", "finetune", "segment", "visualize"):
        assert main(command, ["--weights", run.weights, "--data", data]) == 2
        assert f"error: --data {data}: these images are RGB, the model takes 4 channels" in capsys.readouterr().err


def test_segmentation_of_an_encoder_that_is_not_square_asks_for_a_crop(run_of, capsys):
    run = run_of(next(kind for kind in RUNS if kind[1] == "wide"))
    assert main("segment", ["--weights", run.weights, "--data", run.masks]) == 2
    assert "try:   --crop 16   (positions are resized)" in capsys.readouterr().err


def test_a_run_cannot_pool_by_a_token_that_it_lacks():
    kwargs = "--model.init_args.encoder.kwargs={class_token: false, global_pool: avg}"
    with pytest.raises(UserError, match="--pool cls: this model has no class token"):
        pretrain.main([f"--config={Path(__file__).with_name('tiny.yaml')}", kwargs, "--pool=cls"])

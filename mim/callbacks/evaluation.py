"""Probes, health numbers and pictures while a run learns; random numbers here are keyed, training does not notice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from mim.callbacks.run_log import RunLog
from mim.data.pretrain import PretrainData
from mim.data.sources import Source
from mim.distributed.sharding import gathered
from mim.encoder import Encoder
from mim.errors import UserError
from mim.evaluation.balance import images_per_class, uneven
from mim.evaluation.features import POOLED, Pool, extract
from mim.evaluation.health import feature_std, health_message, rankme
from mim.evaluation.probe import probe, probe_seeds
from mim.evaluation.splits import stratified_split
from mim.methods import Method
from mim.pictures.strips import columns_of, save_strip, strip
from mim.randomness import keyed_generator
from mim.report import write_report
from mim.run.trackers import track_picture
from mim.terminal import paint


class Evaluation(Callback):
    """Measures the encoder before training, at given steps and after training.

    Probes use labels and run only if there are any; RankMe and the spread of the features need none.

    Args:
        run_log: where numbers go.
        data: opened.
        steps: when to measure, besides step 0.
        pool: what is measured: class token or mean of the patch tokens.
        probe_images: most images that a probe learns from; a fifth of that many to test it.
        pictures: images in a strip.
    """

    def __init__(
        self, run_log: RunLog, data: PretrainData, steps: Sequence[int], pool: Pool, probe_images: int, pictures: int
    ) -> None:
        self.run_log, self.data, self.steps, self.pool, self.pictures = run_log, data, set(steps), pool, pictures
        self.bank = _choose(data.source, probe_images, data.seed, "bank")
        self.queries = _choose(data.evaluation, max(1, probe_images // 5), data.seed, "queries")
        self.labelled = _worth_probing(data.source, data.evaluation, self.bank)
        self.scored = _scored(data.source, data.evaluation, self.bank, self.queries) if self.labelled else {}
        self._seen = 0
        self._best: dict[str, float] = {}
        self._headed = False
        self._device = torch.device("cpu")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remembers the device: after training Lightning takes the model off it."""
        self._device = trainer.strategy.root_device

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the untrained encoder: the row that every later one is compared with."""
        self._seen = trainer.global_step
        assert isinstance(pl_module, Method)
        if trainer.global_step == 0:
            if trainer.is_global_zero:
                self._draw_views()
            self._measure(trainer, pl_module, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measures if it is time."""
        step = trainer.global_step
        if step != self._seen and (step in self.steps or step == trainer.max_steps):
            assert isinstance(pl_module, Method)
            self._measure(trainer, pl_module, step)
        self._seen = step

    def features(
        self, *encoders: Encoder, thumbnails: bool = False
    ) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Per encoder: features and labels of the bank, and of the queries if there is a separate test set.

        Args:
            encoders: on one device.
            thumbnails: an entry more: the images themselves, as few numbers.
        """
        banks = self._extract(encoders, self.data.source, self.bank, thumbnails)
        if self.data.evaluation is None:
            return [(*bank, None, None) for bank in banks]
        queries = self._extract(encoders, self.data.evaluation, self.queries, thumbnails)
        return [(*bank, *asked) for bank, asked in zip(banks, queries, strict=True)]

    def final(self, trained: Encoder, untrained: Sequence[Encoder], start: Encoder | None = None) -> dict[str, Any]:
        """Probes over three seeds of the trained encoder and of untrained ones, for the report.

        Args:
            trained: what the run has made.
            untrained: drawn by other seeds.
            start: with the weights that the run began with, if it did not begin with random ones.
        """
        if not self.labelled:
            return {}
        started = [start] if start is not None else []
        encoders = [encoder.to(self._device) for encoder in (trained, *untrained, *started)]
        *pairs, pixels = [probe_seeds(*features) for features in self.features(*encoders, thumbnails=True)]
        held_out = "separate test images" if self.data.evaluation else "a fifth of the images, held out of the probe"
        result: dict[str, Any] = {kind: _beside(f"{kind}_top1", pairs, len(untrained)) for kind in ("knn", "linear")}
        for kind in ("knn", "linear"):
            result[kind] |= {"pixels": pixels[f"{kind}_top1"], "chance": self._chance()}
        if uneven(self.scored):
            result |= {what: _beside(what, pairs, len(untrained)) for what in ("knn_balanced", "linear_balanced")}
            result["images_per_class"] = self.scored
        result["pool"] = self.pool
        result["protocol"] = (
            f"frozen encoder, {POOLED[self.pool]}, centre crop, "
            f"learnt from {len(self.bank):,} images, scored on {held_out}; 20-NN and logistic regression."
        )
        return result

    def _chance(self) -> float:
        """Share of the images right that one always gets by naming the commonest class."""
        return max(self.scored.values()) / sum(self.scored.values())

    def _extract(
        self, encoders: Sequence[Encoder], source: Source, indices: Sequence[int], thumbnails: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Features and labels of each encoder, and of thumbnails if wanted; an image is read once for all of them."""
        device = next(encoders[0].parameters()).device
        self.data.views.to(device)
        parts = [
            [extract(encoder, [batch], self.pool, device) for encoder in encoders]
            + [(_thumbnails(batch[0]).to(device), batch[1].to(device, torch.int64))] * thumbnails
            for batch in self.data.center_batches(source, indices)
        ]  # per batch, per encoder
        if not parts:
            raise UserError(f"--data {self.data.path}: none of the {len(indices)} images chosen for probes can be read")
        return [
            (torch.cat([features for features, _ in own]), torch.cat([labels for _, labels in own]))
            for own in zip(*parts, strict=True)
        ]

    def _measure(self, trainer: Trainer, method: Method, step: int) -> None:
        with self.run_log.paused(), gathered(method):
            if trainer.is_global_zero:
                values = self._values(method)
                epoch = step / method.plan.steps_per_epoch
                self.run_log.metrics.add(step, epoch, values)
                for logger in trainer.loggers:
                    logger.log_metrics(values, step)
                if (picture := self._draw(method, method.plan.passes(step))) is not None:
                    track_picture(trainer.loggers, picture, step)
                self._say(method, step, values)
                write_report(self.run_log.run.path)
            trainer.strategy.barrier()

    def _values(self, method: Method) -> dict[str, float]:
        ((bank, labels, queries, truth),) = self.features(method.evaluated)
        values = {"val/rankme": rankme(bank), "val/feature_std": feature_std(bank)}
        if self.labelled:
            if queries is None or truth is None:
                kept, held = stratified_split(labels, 0.2, self.data.seed, "online probe")
                bank, labels, queries, truth = bank[kept], labels[kept], bank[held], labels[held]
            shown = probe(bank, labels, queries, truth)
            values |= {f"val/{what}": shown[what] for what in shown if what.endswith("top1") or uneven(self.scored)}
        return values

    @torch.no_grad()
    def _draw(self, method: Method, epoch: float) -> Path | None:
        source = self.data.evaluation or self.data.source
        chosen = (self.queries if self.data.evaluation else self.bank)[: self.pictures]
        batches = list(self.data.center_batches(source, chosen))
        if not batches:
            return None
        images = torch.cat([images for images, _ in batches]).to(method.device)
        training = method.training
        method.eval()
        measured = not self.data.pixels.pictures
        picture = strip(images, method.visualize(images), method.evaluated, self.data.mean, self.data.std, measured)
        method.train(training)
        self.run_log.run.images.mkdir(exist_ok=True)
        # Three digits, and decimals only where a run is evaluated within an epoch.
        number = f"{epoch:03.0f}" if epoch.is_integer() else f"{epoch:07.3f}"
        path = self.run_log.run.images / f"epoch_{number}.png"
        save_strip(picture, path)
        return path

    def _table_row(self, epoch: str, values: dict[str, float], dim: int) -> str:
        """What was measured as the next row of a table, whose head goes before the first; the best is green so far."""
        titles = [kind for kind, key in LABELLED.items() if key in values]
        cells = []
        for kind in titles:
            value, best = values[LABELLED[kind]], self._best.get(kind, 0.0)
            self._best[kind] = max(value, best)
            cells.append(paint(f"{value:>8.1%}", "green") if value > best else f"{value:>8.1%}")
        row = f"  {epoch:>8}{''.join(cells)}{values['val/rankme']:>8.0f}/{dim}"
        if self._headed:
            return row
        self._headed = True
        head = f"  {'epoch':>8}{''.join(f'{kind:>8}' for kind in titles)}{'rankme':>8}"
        return f"{paint(head, 'bold')}\n{row}"

    @torch.no_grad()
    def _draw_views(self) -> None:
        """A picture of what is made of some images before the encoder sees them."""
        if not self.pictures:
            return
        images, views = self.data.augmented(min(VIEWED, self.pictures))
        if not len(images):
            return
        self.run_log.run.images.mkdir(exist_ok=True)
        measured, names = not self.data.pixels.pictures, [f"view {number}" for number in range(1, len(views) + 1)]
        shown = {"image": images} | dict(zip(names[: VIEWED + 1], views, strict=False))
        mean, std = self.data.mean, self.data.std
        save_strip(columns_of(shown, mean, std, measured), self.run_log.run.images / "augmentation.png")

    def _say(self, method: Method, step: int, values: dict[str, float]) -> None:
        numbers = [f"{kind} {values[key]:.1%}" for kind, key in LABELLED.items() if key in values]
        numbers += [f"rankme {values['val/rankme']:.0f}/{method.evaluated.dim}"]
        text = f"eval  epoch {method.plan.epochs_at(step)}   " + "   ".join(numbers)
        self.run_log.run.say(text, self._table_row(method.plan.epochs_at(step), values, method.evaluated.dim))
        images = len(self.bank)
        if step > 0 and (message := health_message(values["val/rankme"], method.evaluated.dim, images)):
            self.run_log.run.say(f"health  {message}")


LABELLED = {"knn": "val/knn_top1", "linear": "val/linear_top1"}


VIEWED = 4
"""Images of which the views are shown."""
THUMBNAIL = 8
"""Side in pixels of what stands for an image as it is."""


def _thumbnails(images: Tensor) -> Tensor:
    """``(B, C, H, W)`` as the numbers of a small picture, ``(B, C * 8 * 8)``: what can be told without any model."""
    return F.adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)


def _beside(what: str, pairs: Sequence[dict[str, list[float]]], untrained: int) -> dict[str, list[float]]:
    """One kind of score of the trained encoder, the untrained ones and the start: the order of ``pairs``."""
    # One untrained encoder per seed, each probed on that seed's split.
    random = [pair[what][seed] for seed, pair in enumerate(pairs[1 : 1 + untrained])]
    start = {"start": pairs[-1][what]} if len(pairs) > 1 + untrained else {}
    return {"trained": pairs[0][what], "untrained": random, **start}


def _scored(source: Source, evaluation: Source | None, bank: list[int], queries: list[int]) -> dict[str, int]:
    """How many of the images that probes are scored on, or are held out from, each class has."""
    part, rows = (source, bank) if evaluation is None else (evaluation, queries)
    return images_per_class([(part.labels or [])[row] for row in rows], part.classes)


def _worth_probing(source: Source, evaluation: Source | None, bank: Sequence[int]) -> bool:
    """Whether labels can tell encoders apart: at least two classes, on average five images of each to learn from."""
    if not source.labels or (evaluation is not None and not evaluation.labels):
        return False
    classes = len({source.labels[index] for index in bank})
    return classes >= 2 and len(bank) >= 5 * classes


def _choose(source: Source | None, most: int, seed: int, purpose: str) -> list[int]:
    """At most ``most`` images, spread by a key."""
    if source is None:
        return []
    order = torch.randperm(len(source), generator=keyed_generator(seed, "probe", purpose))
    return sorted(order[:most].tolist())

"""The frame of a segmentation evaluation: opens weights and masks, trains heads, scores, draws, writes into the run."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mim.checkpoint import LoadedEncoder, ModelCard, export_backbone, load_encoder, untrained_encoder
from mim.data.masks import IGNORE
from mim.data.segmentation import SegmentationData
from mim.encoder import Encoder
from mim.errors import UserError
from mim.evaluation.segmentation import SegmentationOptim, SegmentationScores, SemanticSegmentation
from mim.evaluation.segmentation_heads import KNNHead, LinearHead, UPerHead, patch_labels
from mim.evaluation.windows import Inference
from mim.measure import TRAINED, UNTRAINED, finish_section, in_words, reduction_facts, section_name
from mim.overlays import save_overlay
from mim.processes import process_rank
from mim.randomness import derive_seed, keyed_generator
from mim.reduction import Labels, TokenReduction
from mim.reduction_io import build_reduction, save_reduction
from mim.report.tables import spread, text_table
from mim.run import evaluation_folder, quieten
from mim.segment_options import HeadRecipe, MaskedSubject, Scoring
from mim.supervised import fit, keep_result, open_trainer, pictures_of_first, remember, training_folder

HEAD_FILE = "head.safetensors"
_SCORES = "scores.json"
_PATCHES_PER_IMAGE = 64  # most patches that one image gives to a k-NN bank


class Segmentation:
    """One evaluation, opened: the encoder and the masks have been looked at.

    Args:
        subject: what is measured on what.
        recipe: how heads learn.
        scoring: how images are scored.

    Attributes:
        reduction: of every encoder that is scored from now on, if ``subject`` names none.
    """

    def __init__(self, subject: MaskedSubject, recipe: HeadRecipe, scoring: Scoring) -> None:
        quieten(process_rank())
        if scoring.threads:
            torch.set_num_threads(scoring.threads)
        self.subject, self.recipe, self.scoring = subject, recipe, scoring
        self.loaded: LoadedEncoder = load_encoder(subject.weights, **self._opening)
        encoder = self.loaded.encoder
        if encoder.img_size[0] != encoder.img_size[1]:
            raise UserError(f"--weights {subject.weights} sees {encoder.img_size}, not squares", hint="--crop 224")
        self.crop = encoder.img_size[0]
        self.taps = recipe.blocks(len(encoder.vit.blocks))
        built_in = subject.data in ("builtin", "shapes")
        self.steps = 0 if recipe.head == "knn" else recipe.steps or (300 if built_in else 4000)
        warmup = min(1500, self.steps // 10) if recipe.warmup_steps is None else recipe.warmup_steps
        lr = recipe.lr or {"linear": 1e-3, "upernet": 1e-4, "knn": 0.0}[recipe.head]
        self.optim = SegmentationOptim(lr, self.steps, warmup, recipe.weight_decay, recipe.layer_decay, recipe.anneal)
        self.inference = Inference(
            scoring.inference,
            self.crop,
            scoring.stride or max(1, 2 * self.crop // 3),
            scoring.scales,
            scoring.flip,
            encoder.patch_size,
        )
        self.data = self._data(0)
        self.reduction: TokenReduction | None = None
        self._reduced(encoder)

    @property
    def _opening(self) -> dict[str, Any]:
        subject, whole = self.subject, self.scoring.inference == "whole"
        return {
            "model": subject.model,
            "img_size": subject.crop,
            "dynamic_img_size": whole,
            "trust": subject.trust,
        }

    def _data(self, seed: int) -> SegmentationData:
        subject = self.subject
        data = SegmentationData(
            subject.data,
            self.crop,
            self.recipe.batch_size,
            self.recipe.scale,
            subject.num_classes,
            subject.ignored,
            subject.reduce_zero_label,
            subject.classes,
            subject.split,
            subject.num_workers,
            seed,
        )
        data.open(self.loaded.mean, self.loaded.std, self.loaded.pixels)
        return data

    def introduce(self) -> None:
        """Says what will be done before it is done."""
        data, numbers = self.data, self.data.numbers
        ignored = ", ".join(map(str, [*([0] if numbers.zero_is_other else []), *numbers.ignore]))
        print(f"segment: {self.recipe.head} head on {self.subject.weights}")
        print(f"  weights {self.loaded.note}")
        print(
            f"  data    {self.subject.data}: {len(data.train):,} images to learn from, {len(data.test):,} in "
            f"{data.split} to be scored, {numbers.count} classes, values {ignored} ignored"
        )
        print(f"  protocol {self.protocol()}", flush=True)

    def protocol(self) -> str:
        """How the numbers came about, in words."""
        recipe, how = self.recipe, self.inference
        encoder = "fine-tuned" if recipe.finetune else "frozen"
        blocks = ", ".join(str(tap) for tap in self.taps)
        learning = f"{recipe.k} votes of up to {recipe.bank:,} labelled patches"
        if self.steps:
            learning = f"{self.steps:,} steps of {recipe.batch_size} crops, AdamW, learning rate {self.optim.lr:g}"
        if recipe.finetune:
            learning += f", layer decay {recipe.layer_decay:g}, drop path {recipe.drop_path:g}"
        shown = f"windows of {how.crop} every {how.stride} px" if how.mode == "slide" else "the whole image at once"
        shown += f", scales {', '.join(f'{scale:g}' for scale in how.scales)}" if how.scales != (1.0,) else ""
        shown += ", mirrored too" if how.flip else ""
        ignored = ", ".join(map(str, self.data.numbers.ignore))
        return (
            f"{encoder}, {recipe.head} head on blocks {blocks}, {self.crop} px crops; {learning}; "
            f"scored with {shown} at the masks' full size, {ignored} ignored{in_words(self.loaded.encoder)}."
        )

    def measure(self, resume: bool = False, save_every: int = 1000) -> None:
        """Trains and scores every seed, trained and untrained encoder in turn, and writes the result.

        Args:
            resume: go on where the same measurement was stopped.
            save_every: steps between two checkpoints.

        Raises:
            StoppedError: after a signal; the step that was running is saved.
        """
        root, first = self._folder(), process_rank() == 0
        if first:
            remember(root, self._settings(), resume)
        results: dict[str, list[SegmentationScores]] = {TRAINED: [], UNTRAINED: []}
        for seed in range(self.recipe.seeds):
            for who in (UNTRAINED, TRAINED):
                folder = training_folder(root, who, seed)
                if resume and (folder / _SCORES).is_file():
                    scores = SegmentationScores(*json.loads((folder / _SCORES).read_text()))
                else:
                    scores, model = self.score(who, seed, folder, resume, save_every)
                    if first:
                        keep_result(folder, _SCORES, scores)
                    if first and seed == 0 and who == TRAINED:
                        self._draw(model, folder)
                        self._export(model, root / "export")
                results[who].append(scores)
                if first:
                    print(
                        f"  seed {seed}  {who:<11} mIoU {scores.miou:.1%}   pixels {scores.pixel_accuracy:.1%}",
                        flush=True,
                    )
        if first:
            pictures_of_first(root)
            self._write(results, root)

    def score(
        self, who: str, seed: int, folder: Path, resume: bool = False, save_every: int = 1000
    ) -> tuple[SegmentationScores, SemanticSegmentation]:
        """Scores of one encoder, trained or not, with one seed, and what gave them; ``folder`` is for checkpoints."""
        torch.manual_seed(derive_seed(seed, "segment head"))
        encoder = self._encoder(who, seed)
        data = self.data
        data.seed = seed
        scoring = self.scoring
        trainer = open_trainer(
            folder,
            max(1, self.steps),
            save_every,
            accelerator=scoring.accelerator,
            devices=scoring.devices,
            precision=scoring.precision,
        )
        if self.recipe.batch_size % trainer.world_size:
            near = max(1, self.recipe.batch_size // trainer.world_size) * trainer.world_size
            raise UserError(
                f"--batch_size {self.recipe.batch_size} does not divide by {trainer.world_size} devices",
                hint=f"--batch_size {near}",
            )
        head = self._head(encoder, seed, trainer.strategy.root_device)
        finetune, drop_path = self.recipe.finetune, self.recipe.drop_path if self.recipe.finetune else 0.0
        model = SemanticSegmentation(
            encoder, head, self.taps, data.numbers.count, self.optim, self.inference, finetune, drop_path, seed
        )
        if self.steps:
            fit(trainer, model, data, folder, resume, "a lower --lr   or   more --warmup_steps")
        trainer.validate(model, datamodule=data, verbose=False)
        assert model.scores is not None
        return model.scores, model.to(trainer.strategy.root_device).eval()

    def _settings(self) -> dict[str, Any]:
        """What the result is a function of."""
        neither = ("num_workers", "out", "trust", "pictures", "accelerator", "devices", "threads")
        given = asdict(self.subject) | asdict(self.recipe) | asdict(self.scoring)
        if (reduction := self.loaded.encoder.reduction) is not None:
            given["reduction"] = reduction.describe()  # a file may say something else by the time training goes on
        return {name: value for name, value in given.items() if name not in neither}

    def _encoder(self, who: str, seed: int) -> Encoder:
        """A fresh one: fine-tuning changes it."""
        if who == UNTRAINED:
            return self._reduced(untrained_encoder(self.subject.weights, seed, **self._opening))
        return self._reduced(load_encoder(self.subject.weights, **self._opening).encoder)

    def _reduced(self, encoder: Encoder) -> Encoder:
        """The same encoder with the reduction that was asked for, if any; the caller has seeded what it will learn."""
        encoder.reduction = self.reduction
        if self.subject.reduction is not None:
            labels = Labels(self.data.numbers.count, masks=True) if self.recipe.finetune else None
            encoder.reduction = build_reduction(self.subject.reduction, encoder.vit, labels).eval()
        return encoder

    def _head(self, encoder: Encoder, seed: int, device: torch.device) -> nn.Module:
        recipe, classes = self.recipe, self.data.numbers.count
        if recipe.head == "knn":
            return KNNHead(*self._bank(encoder.to(device), seed, device), classes, recipe.k)
        if recipe.head == "upernet":
            return UPerHead(encoder.dim, classes)
        return LinearHead(encoder.dim, len(self.taps), classes, recipe.batch_norm)

    @torch.no_grad()
    def _bank(self, encoder: Encoder, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features ``(M, D)`` and classes ``(M,)`` of patches of the training images' middles."""
        data, bank = self.data, []
        order = torch.randperm(len(data.train), generator=keyed_generator(seed, "segment bank"))
        wanted = max(1, -(-self.recipe.bank // _PATCHES_PER_IMAGE))
        for index in order[:wanted].tolist():
            image, classes = data.middle(data.train, index)
            tokens = encoder.after_blocks(data.normalize(image[None].to(device)), self.taps)
            features = torch.cat([encoder.dense(tapped) for tapped in tokens], dim=1)[0].flatten(1).T  # (N, taps * D)
            labels = patch_labels(classes[None].to(device), encoder.grid, data.numbers.count)[0].flatten()
            known = (labels != IGNORE).nonzero()[:, 0]
            drawn = torch.randperm(len(known), generator=keyed_generator(seed, "patches", index))
            kept = known[drawn[:_PATCHES_PER_IMAGE].to(device)]
            bank.append((features[kept], labels[kept]))
        features, labels = (torch.cat(part)[: self.recipe.bank] for part in zip(*bank, strict=True))
        return features, labels

    def _folder(self) -> Path:
        name = section_name(f"segment-{self.recipe.head}", self.subject.reduction)
        return evaluation_folder(self.subject.weights, self.subject.out, name)

    @torch.no_grad()
    def _draw(self, model: SemanticSegmentation, folder: Path) -> None:
        """Image, truth and answer of some scored images, spread over all."""
        data, count = self.data, min(self.scoring.pictures, len(self.data.test))
        for number in range(count):
            image, classes = data.scored(data.test, number * len(data.test) // count)
            answer = model.answer(data.normalize(image.to(model.device)), classes.shape[1:])[0].cpu()
            save_overlay(folder / f"overlay_{number}.png", image[0], classes[0], answer, data.names)

    def _export(self, model: SemanticSegmentation, folder: Path) -> None:
        """A fine-tuned encoder as a timm folder, the weights of its head beside it."""
        if not self.recipe.finetune:
            return
        data, loaded = self.subject.data, self.loaded
        card = ModelCard(
            method="segmentation",
            data=data,
            data_licence="unknown",
            images=len(self.data.train),
            steps=self.steps,
            command=" ".join(["python", *sys.argv]),
            notes=(self.protocol(), f"Classes, in order: {', '.join(self.data.names)}"),
        )
        model = model.cpu()
        scale = loaded.pixels.exported(loaded.mean, loaded.std)
        export_backbone(model.encoder.vit, folder, card=card, model_args={}, **scale)
        if model.encoder.reduction is not None:
            save_reduction(model.encoder.reduction, folder)
        save_file({name: value.contiguous() for name, value in model.head.state_dict().items()}, folder / HEAD_FILE)
        if model.encoder.reduction is not None:
            save_reduction(model.encoder.reduction, folder)
        print(f'  model   {folder}   (timm.create_model("local-dir:{folder}", pretrained=True); head in {HEAD_FILE})')

    def _write(self, results: dict[str, list[SegmentationScores]], folder: Path) -> None:
        """Prints the table, writes ``metrics.json`` and puts the section into the run's report."""
        protocol = self.protocol()
        rows = {
            "mIoU": [[scores.miou for scores in results[who]] for who in (TRAINED, UNTRAINED)],
            "pixel accuracy": [[scores.pixel_accuracy for scores in results[who]] for who in (TRAINED, UNTRAINED)],
        }
        print(f"\nSemantic segmentation: {protocol}\n")
        print(text_table(["", TRAINED, UNTRAINED], [[what, *map(spread, pair)] for what, pair in rows.items()]))
        metrics: dict[str, Any] = {}
        for what, (trained, untrained) in rows.items():
            metrics |= {what: trained, f"{what}, {UNTRAINED}": untrained}
        metrics["images"] = len(self.data.test)
        for who in (TRAINED, UNTRAINED):
            ious = torch.tensor([scores.iou for scores in results[who]]).nanmean(0).tolist()
            metrics[f"IoU per class, {who}"] = {
                name: round(iou, 4) if iou == iou else "absent" for name, iou in zip(self.data.names, ious, strict=True)
            }
        content = {"title": f"Semantic segmentation, {self.recipe.head} head", "protocol": protocol, "metrics": metrics}
        content |= {"weights": self.subject.weights, "data": self.subject.data, "note": self.loaded.note}
        content |= reduction_facts(self.loaded.encoder, self.subject.reduction)
        (folder / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")
        finish_section(folder)

"""Semantic segmentation: heads are trained on an encoder's features, or with it, and scored beside untrained ones."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import lcm, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mim.data.mask_classes import IGNORE
from mim.data.places import BUILT_IN
from mim.data.segmentation import SegmentationData
from mim.distributed.processes import process_rank
from mim.encoder import Encoder
from mim.errors import UserError
from mim.evaluation.segmentation import SegmentationOptim, SegmentationScores, SemanticSegmentation
from mim.evaluation.segmentation_heads import KNNHead, LinearHead, UPerHead, patch_labels
from mim.evaluation.windows import Inference
from mim.options.evaluation import Scores, TrainingOptions
from mim.options.segmentation import Scoring, SegmentationOptions, SegmentationRecipe
from mim.pictures.overlays import save_overlay
from mim.program import origin
from mim.randomness import derive_seed, keyed_generator
from mim.reduction import Labels, TokenReduction
from mim.reduction.files import save_reduction
from mim.run.weights import ModelCard, export_backbone
from mim.transfer.measurement import PRETRAINED, UNTRAINED, Measurement, finish_section
from mim.transfer.training import fit, open_trainer, train_all

HEAD_FILE = "head.safetensors"
_SCORES = "scores.json"
_NOT_OF_THE_RESULT = ("num_workers", "out", "trust", "pictures", "device", "devices", "threads", "resume")
_PATCHES_PER_IMAGE = 64  # most patches that one image gives to a k-NN bank


class Segmentation(Measurement):
    """Weights and masks, opened and looked at.

    Args:
        options: what is measured on what.
        recipe: how heads learn.
        scoring: how images are scored.
        training: what heads are trained on.

    Attributes:
        reduction: of every encoder that is scored from now on, if ``options`` name none.
    """

    options: SegmentationOptions

    def __init__(
        self,
        options: SegmentationOptions,
        recipe: SegmentationRecipe,
        scoring: Scoring,
        training: TrainingOptions,
    ) -> None:
        super().__init__(options, img_size=options.crop, dynamic_img_size=scoring.inference == "whole")
        self.recipe, self.scoring, self.training = recipe, scoring, training
        encoder = self.loaded.encoder
        if encoder.img_size[0] != encoder.img_size[1]:
            step = lcm(*encoder.patch_size)
            near = max(1, round(sqrt(prod(encoder.img_size)) / step)) * step
            raise UserError(
                f"--weights {options.weights} sees {encoder.img_size}, not squares",
                why="crops are square",
                hint=f"--crop {near}   (positions are resized)",
            )
        self.crop = encoder.img_size[0]
        self.taps = recipe.blocks(encoder.depth)
        built_in = options.data in BUILT_IN
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
        self.labels = Labels(self.data.numbers.count, masks=True) if recipe.finetune else None
        self.reduction: TokenReduction | None = None
        self.reduce(encoder)
        self.introduce(self._data_in_words())

    def _data(self, seed: int) -> SegmentationData:
        options = self.options
        data = SegmentationData(
            options.data,
            self.crop,
            self.recipe.batch_size,
            self.recipe.scale,
            options.num_classes,
            options.ignored,
            options.reduce_zero_label,
            options.classes,
            options.split,
            self.workers,
            seed,
            options.values,
            options.val_fraction,
        )
        data.open(self.loaded.mean, self.loaded.std, self.loaded.pixels)
        return data

    def _data_in_words(self) -> str:
        data, numbers = self.data, self.data.numbers
        ignored = ", ".join(map(str, sorted(numbers.unscored)))
        notes = "".join(f"\n          {note}" for note in data.notes)
        return (
            f"{len(data.train):,} images to learn from, {len(data.test):,} in {data.split} to be scored, "
            f"{numbers.count} classes, values {ignored or 'none'} ignored{notes}"
        )

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
        ignored = ", ".join(map(str, sorted(self.data.numbers.unscored))) or "none"
        return (
            f"{encoder}, {recipe.head} head on the patch tokens of blocks {blocks}, {self.crop} px crops; {learning}; "
            f"scored with {shown} at the masks' full size, {ignored} ignored{self.reduced_in_words()}."
        )

    def measure(self, save_every: int = 1000) -> Scores:
        """Trains and scores every seed, trained and untrained encoder in turn, and writes the result.

        Args:
            save_every: steps between two checkpoints.

        Raises:
            StoppedError: after a signal; the step that was running is saved.
        """
        root = self.folder(f"segment-{self.recipe.head}")
        parts = (asdict(self.options), asdict(self.recipe), asdict(self.scoring), asdict(self.training))
        settings = self.settings(*parts, without=_NOT_OF_THE_RESULT)

        def train(who: str, seed: int, folder: Path) -> SegmentationScores:
            scores, model = self.score(who, seed, folder, save_every)
            if self.is_main_process and seed == 0 and who == PRETRAINED:
                self._draw(model, folder)
                self._export(model, root / "export")
            return scores

        found = train_all(
            root, settings, (UNTRAINED, PRETRAINED), self.recipe.seeds, _SCORES, train, self.training.resume
        )
        results = {who: [SegmentationScores(*scores) for scores in found[who]] for who in (PRETRAINED, UNTRAINED)}
        scores: Scores = {
            "mIoU": {who: [one.miou for one in all_] for who, all_ in results.items()},
            "pixel accuracy": {who: [one.pixel_accuracy for one in all_] for who, all_ in results.items()},
        }
        if self.is_main_process:
            title = f"Semantic segmentation, {self.recipe.head} head"
            self.write(root, title, self.protocol(), scores, "tokens", self._details(results))
            finish_section(root)
        return scores

    def score(
        self, who: str, seed: int, folder: Path, save_every: int = 1000
    ) -> tuple[SegmentationScores, SemanticSegmentation]:
        """Scores of one encoder, trained or not, with one seed, and what gave them; ``folder`` is for checkpoints."""
        torch.manual_seed(derive_seed(seed, "segment head"))
        encoder = self.reduce(self.fresh(who, seed))
        data = self.data
        data.seed = seed
        trainer = open_trainer(folder, max(1, self.steps), save_every, self.training, self.device)
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
            hint = f"--lr {self.optim.lr / 10:g}   (a lower --lr)   or   more --warmup_steps"
            fit(trainer, model, data, folder, self.training.resume, hint)
        trainer.validate(model, datamodule=data, verbose=False)
        assert model.scores is not None
        if process_rank() == 0:
            print(
                f"  seed {seed}  {who:<11} mIoU {model.scores.miou:.1%}   pixels {model.scores.pixel_accuracy:.1%}",
                flush=True,
            )
        return model.scores, model.to(trainer.strategy.root_device).eval()

    def reduce(self, encoder: Encoder) -> Encoder:
        """The same encoder with its reduction; the caller has seeded what that will learn."""
        encoder.reduction = self.reduction
        return super().reduce(encoder)

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
        data, loaded = self.options.data, self.loaded
        card = ModelCard(
            method="segmentation",
            data=data,
            data_licence="unknown",
            images=len(self.data.train),
            steps=self.steps,
            command=origin("segment"),
            notes=(self.protocol(), f"Classes, in order: {', '.join(self.data.names)}"),
        )
        model = model.cpu()
        scale = loaded.pixels.exported(loaded.mean, loaded.std)
        size = loaded.encoder.img_size
        export_backbone(model.encoder.vit, folder, card=card, pool=loaded.pool, img_size=size, **scale)
        facts: dict[str, Any] = {
            "format": "pt",
            "head": self.recipe.head,
            "taps": self.taps,
            "classes": list(self.data.names),
        }
        facts |= {"dim": model.encoder.dim, "batch_norm": self.recipe.batch_norm}
        metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
        state = {name: value.contiguous() for name, value in model.head.state_dict().items()}
        save_file(state, folder / HEAD_FILE, metadata)
        if model.encoder.reduction is not None:
            save_reduction(model.encoder.reduction, folder)
        print(f'  model   {folder}   (timm.create_model("local-dir:{folder}", pretrained=True); head in {HEAD_FILE})')

    def _details(self, results: Mapping[str, Sequence[SegmentationScores]]) -> dict[str, Any]:
        """How many images were scored, and the mean over seeds for each class."""
        details: dict[str, Any] = {"images": len(self.data.test)}
        for who, scores in results.items():
            ious = torch.tensor([one.iou for one in scores]).nanmean(0).tolist()
            details[f"IoU per class, {who}"] = {
                name: round(iou, 4) if iou == iou else "absent" for name, iou in zip(self.data.names, ious, strict=True)
            }
        return details

"""Semantic segmentation on a frozen or fine-tuned encoder, scored exactly over any number of processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics.classification import MulticlassConfusionMatrix

from mim.data.mask_classes import IGNORE
from mim.encoder import Encoder
from mim.evaluation.supervised import SupervisedTraining, set_drop_path
from mim.evaluation.windows import Inference, predict
from mim.randomness import derive_seed
from mim.reduction import Tokens
from mim.schedules import between, warmup_poly


@dataclass(frozen=True)
class SegmentationOptim:
    """AdamW with linear warm-up and polynomial decay, per step.

    Args:
        lr: peak learning rate of the head.
        steps: optimizer steps in all.
        warmup_steps: of linear warm-up.
        weight_decay: for everything but biases, normalisation and the encoder's tokens.
        layer_decay: the encoder's learning rate falls by this factor per block from the head down; fine-tuning only.
        anneal: share of the steps in which a reduction grows to its full strength in a straight line; fine-tuning only.
    """

    lr: float
    steps: int
    warmup_steps: int = 0
    weight_decay: float = 0.05
    layer_decay: float = 0.65
    anneal: float = 0.0


class SegmentationScores(NamedTuple):
    """What segmentations are compared by; shares of 1.

    Args:
        miou: mean over classes of intersection over union, over the classes that occur in truth or answers.
        pixel_accuracy: share of scored pixels that are right.
        iou: per class; NaN where a class occurs in neither.
    """

    miou: float
    pixel_accuracy: float
    iou: list[float]


def scores_of(confusion: Tensor) -> SegmentationScores:
    """Scores from pixel counts ``(classes, classes)``, truth by answer."""
    counts = confusion.double()
    hits = counts.diagonal()
    iou = hits / (counts.sum(0) + counts.sum(1) - hits)  # 0 / 0 where a class occurs nowhere
    return SegmentationScores(float(iou.nanmean()), float(hits.sum() / counts.sum()), iou.tolist())


class SemanticSegmentation(SupervisedTraining):
    """An encoder, taps into its blocks, and a head.

    Args:
        encoder: built for the crop.
        head: see :mod:`mim.evaluation.segmentation_heads`.
        taps: blocks whose features the head reads, from 0; each goes through the final norm, as in iBOT.
        classes: number of classes.
        optim: learning rate and length.
        inference: how images are scored.
        finetune: train the encoder, too.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first; fine-tuning only.
        seed: of everything random in the layers.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: nn.Module,
        taps: Sequence[int],
        classes: int,
        optim: SegmentationOptim,
        inference: Inference,
        finetune: bool = False,
        drop_path: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.taps = encoder.requires_grad_(finetune), head, list(taps)
        self.head_weights: tuple[float, ...] = cast(Any, head).weights
        self.optim, self.inference, self.finetune, self.seed = optim, inference, finetune, seed
        for name in encoder.behind_patches:
            if (part := getattr(encoder.vit, name, None)) is not None:
                part.requires_grad_(False)
        set_drop_path(encoder.vit, drop_path)
        # Values were checked where masks are read; looking again would wait for the device.
        self.confusion = MulticlassConfusionMatrix(classes, ignore_index=IGNORE, validate_args=False)
        self.scores: SegmentationScores | None = None
        self.train()  # an encoder that was loaded to be measured is in evaluation mode, which Lightning leaves as it is

    def train(self, mode: bool = True) -> "SemanticSegmentation":
        """A frozen encoder stays as it is scored: without drop path."""
        super().train(mode)
        self.encoder.train(mode and self.finetune)
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """Patch features after the chosen blocks, each ``(B, D, h, w)``."""
        return self._encoded(images)[0]

    def _encoded(self, images: Tensor) -> tuple[list[Tensor], Tokens]:
        """Features, and the tokens after the last of the chosen blocks."""
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            tokens = self.encoder.after_blocks(images, self.taps)
            return [self.encoder.dense(tapped) for tapped in tokens], tokens[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes, H, W)`` of normalised crops ``(B, C, H, W)``."""
        features, tokens = self._encoded(images)
        answer = tokens.answered(self.head(features)[0])
        return F.interpolate(answer.float(), images.shape[2:], mode="bilinear")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the scored pixels of the global batch, the head's auxiliary ones, and a reduction's."""
        images, classes = batch
        targets = classes.long()
        count = (targets != IGNORE).sum().clamp(min=1)
        world = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(count)  # shares hold different numbers of scored pixels
            world = torch.distributed.get_world_size()
        loss = images.new_zeros(())
        features, tokens = self._encoded(images)
        for weight, answer in zip(self.head_weights, self.head(features), strict=True):
            logits = F.interpolate(tokens.answered(answer).float(), images.shape[2:], mode="bilinear")
            loss = loss + weight * F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        loss = loss * world / count  # gradients are averaged over processes
        if self.finetune and self.encoder.reduction is not None:
            loss = loss + self.encoder.reduction.auxiliary_loss(tokens, targets)
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Counts pixels at the full resolution of the masks."""
        images, classes = batch
        self.confusion.update(self.answer(images, classes.shape[1:]), classes.long())

    def answer(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """The class of every pixel ``(B, *size)`` of normalised images of any size."""
        return predict(self, images, (size[0], size[1]), self.inference).argmax(1)

    def on_validation_epoch_start(self) -> None:
        """Begins to count, at the full strength of a reduction."""
        if self.encoder.reduction is not None:
            self.encoder.reduction.strength = 1.0
        self.confusion.reset()

    def on_validation_epoch_end(self) -> None:
        """Adds up the counts of all processes: sums of whole numbers, so the same for any number of them."""
        self.scores = scores_of(self.confusion.compute())

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Dropout, drop path and the strength of a reduction become functions of the step."""
        if self.encoder.reduction is not None:
            progress = self.global_step / self.optim.steps
            self.encoder.reduction.strength = between(progress, 0.0, self.optim.anneal) if self.finetune else 1.0
        torch.manual_seed(derive_seed(self.seed, "segment layers", self.global_step, self.global_rank))

    def configure_optimizers(self) -> Optimizer:
        """AdamW over the head and, in layer-wise groups, the encoder."""
        groups = _decay_groups(self.head, self.optim.weight_decay)
        if self.finetune:
            vit, rate = self.encoder.vit, self.optim.layer_decay
            layers = param_groups_layer_decay(vit, self.optim.weight_decay, _undecayed(vit), layer_decay=rate)
            # Without a head of its own timm gives the last block 1; here the head has 1, the last block one step less.
            groups += [{**group, "lr_scale": group["lr_scale"] * rate} for group in layers]
            if self.encoder.reduction is not None:
                groups += _decay_groups(self.encoder.reduction, self.optim.weight_decay)
        fused = self.device.type == "cuda" or None  # elsewhere torch's choice, as ever: sums would round otherwise
        return AdamW(groups, lr=self.optim.lr, betas=(0.9, 0.999), fused=fused)

    def learning_rate(self, step: int) -> float:
        """Of the head: linear warm-up, then polynomial decay."""
        return warmup_poly(step, self.optim.warmup_steps, self.optim.steps, self.optim.lr)


def _undecayed(net: nn.Module) -> set[str]:
    """Parameters that timm's model names as not to be decayed; conv nets name none."""
    return cast(Any, net).no_weight_decay() if hasattr(net, "no_weight_decay") else set()


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed, plain = ([p for p in parameters if (p.ndim > 1) == many] for many in (True, False))
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]

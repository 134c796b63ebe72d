"""How classification is measured: options of ``knn``, ``linear_probe`` and ``finetune``, without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mim.options.evaluation import EvaluationOptions
from mim.options.ranges import Count, NotNegative, Positive, Share, ShareBelowOne, SomeShare, Whole


@dataclass(frozen=True)
class ClassificationOptions(EvaluationOptions):
    """Labelled images, and how they are shown to the encoder.

    Args:
        data: folder with train/ and val/ (or test/), folder of class folders, labelled list or tar shards, builtin or
            shapes.
        img_size: pixels per side instead of the model's own; positions are resized.
        crop_pct: side of the scored middle as a share of the resized image's shorter side; the papers use 0.875, 224
            of 256 pixels.
        val_fraction: share of each class that is held out and scored if the data sets nothing apart.
        classes: same, or common to score those that both parts have.
        label_column: column of a table, or number of a folder's level, that holds the
            labels; found unless given.
        max_bad: share of unreadable files that is tolerated.
        encode_batch: images encoded at once.
        cache: folder of features that were computed before; safe to delete.
    """

    img_size: Count | None = None
    crop_pct: SomeShare = 1.0
    val_fraction: ShareBelowOne = 0.2
    classes: Literal["same", "common"] = "same"
    label_column: int | str | None = None
    max_bad: Share = 0.01
    encode_batch: Count = 64
    cache: Path = Path("runs/features")


@dataclass(frozen=True)
class ProbeRecipe:
    """How a classifier is trained on frozen features.

    Args:
        head: ``linear``; ``attentive``, a transformer block with one learned query over the patch tokens; or
            ``multi_query``, several learned queries without a block (arXiv:2506.10178).
        lrs: learning rates to choose from, as [0.01,0.1], all trained in one pass. Of a linear head they are for 256
            images, as in the papers: the one used is lr x batch_size / 256.
        select: how the best is chosen: on a tenth of the images to learn from (held_out; then trained again on all of
            them), or as many papers do, with the best epoch, on the very images that are reported (on_test), which
            reads too high.
        epochs: passes over the features.
        warmup_epochs: linear warm-up from 0; then half a cosine to 0.
        batch_size: feature rows per step.
        optimizer: of a linear head: sgd or lars, both with momentum 0.9 and no weight decay; others take AdamW.
        norm: in front of a linear head: batch, without parameters of its own as in MAE, or none as in iBOT.
        queries: of multi_query.
    """

    head: Literal["linear", "attentive", "multi_query"] = "linear"
    lrs: tuple[Positive, ...] | None = None
    select: Literal["held_out", "on_test"] = "held_out"
    epochs: Count = 90
    warmup_epochs: Whole = 10
    batch_size: Count = 256
    optimizer: Literal["sgd", "lars"] = "sgd"
    norm: Literal["batch", "none"] = "batch"
    queries: Count = 16

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates, the head's own range unless given."""
        linear = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
        return self.lrs or (linear if self.head == "linear" else (1e-4, 3e-4, 1e-3, 3e-3))


@dataclass(frozen=True)
class FinetuneRecipe:
    """How a whole encoder is trained with labels; the defaults are MAE's for ViT-B (arXiv:2111.06377, table 9).

    Args:
        epochs: passes over the images to learn from.
        batch_size: images per step over all devices.
        blr: base learning rate; the one used is blr x batch_size / 256.
        min_lr: learning rate at the last step.
        warmup_epochs: linear warm-up from 0; then half a cosine.
        weight_decay: of AdamW, for matrices.
        layer_decay: factor of the learning rate from one block to the one before; a final norm, which there is with the
            class token pooled, learns as the last block (timm's groups; in MAE's it learns as the classifier).
        drop_path: stochastic depth of the last block, rising linearly from 0.
        pool: what the classifier sees: mean of the patch tokens behind a new norm, or the class token; what the run or
            the model pools by unless given.
        auto_augment: timm's name of a RandAugment policy; none for random crops and flips alone.
        erase: probability that a rectangle of an image becomes noise.
        mixup: strength of mixup; 0 for none.
        cutmix: strength of CutMix; 0 for none.
        label_smoothing: share of the label that is spread over all classes.
        ema: decay of an average of the weights, which is then what is scored and exported; 0 for none.
        scale: smallest and largest share of the image's area in a random crop.
        anneal: shares of the training between which a reduction grows to its full strength along half a cosine, as
            EViT's keep rate does; full from the first step unless given.
        teacher: folder of a classifier that was fine-tuned without reduction; with one, answers and tokens are to agree
            with its own, as in DynamicViT.
        memory: memory cells in each block of an encoder that stands still, 5 in most of the paper's results
            (arXiv:2203.15243); they, a class token and a classifier learn then, all by blr, and tasks that were
            learned before stay as they are.
        tlm: share of the tokens of each block that lose connections in training: that to themselves, or all others
            (token-level masking, a paper on text); plain ViTs; 0 for none.
        memory_norm: pass memory through the norm of its block, as tokens are; otherwise it comes behind it.
    """

    epochs: Positive = 100.0
    batch_size: Count = 1024
    blr: Positive = 5e-4
    min_lr: NotNegative = 1e-6
    warmup_epochs: NotNegative = 5.0
    weight_decay: NotNegative = 0.05
    layer_decay: SomeShare = 0.65
    drop_path: ShareBelowOne = 0.1
    pool: Literal["mean", "cls"] | None = None
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    erase: Share = 0.25
    mixup: NotNegative = 0.8
    cutmix: NotNegative = 1.0
    label_smoothing: ShareBelowOne = 0.1
    ema: ShareBelowOne = 0.0
    scale: tuple[SomeShare, SomeShare] = (0.08, 1.0)
    anneal: tuple[Share, Share] = (0.0, 0.0)
    teacher: str | None = None
    memory: Whole | None = None
    memory_norm: bool = True
    tlm: ShareBelowOne = 0.0

    @property
    def without_use(self) -> list[str]:
        """Settings that differ from the default although memory leaves nothing for them to do."""
        encoders = ("layer_decay", "drop_path", "anneal", "teacher", "tlm")
        return [name for name in encoders if getattr(self, name) != getattr(FinetuneRecipe, name)]

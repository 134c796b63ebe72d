"""What a segmentation evaluation measures and how: the options of ``segment``, without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mim.errors import UserError
from mim.options.evaluation import EvaluationOptions
from mim.options.ranges import Count, NotNegative, Positive, Share, ShareBelowOne, SomeShare, Whole, check_rising


@dataclass(frozen=True)
class SegmentationOptions(EvaluationOptions):
    """Images with masks, and what their numbers mean.

    Args:
        data: folder with images/ beside masks/, with or without train/ and val/, or in the layout of ADE20K, Pascal
            VOC, CVAT or Cityscapes; builtin (mosaics) or shapes.
        crop: pixels per side that the model sees instead of its own; positions are resized.
        num_classes: scored classes; as many as are named or found unless given.
        mask_values: value in the masks of each class, as 0,255; 0, 1, 2 and so on unless given.
        ignore: values in the masks of pixels that are not scored, as 255 or 255,0.
        reduce_zero_label: 0 is not scored and classes begin at 1; only in ADE20K's layout unless given.
        classes: file of class names, one per line, or a number and a name, or a colour and a name (128 64 128 road)
            for masks in colours.
        split: part that is scored; the first that is called like val or test unless given.
        val_fraction: share of the images that is held out and scored if the data sets nothing apart.
    """

    crop: Count | None = None
    num_classes: int | None = None
    mask_values: int | str | None = None
    ignore: int | str = 255
    reduce_zero_label: bool | None = None
    classes: Path | None = None
    split: str | None = None
    val_fraction: ShareBelowOne = 0.2

    @property
    def ignored(self) -> tuple[int, ...]:
        """The values that are not scored."""
        return _numbers("--ignore", self.ignore, "--ignore 255   or   --ignore 255,0")

    @property
    def values(self) -> tuple[int, ...] | None:
        """The value of each class in the masks, if they are given."""
        if self.mask_values is None:
            return None
        return _numbers("--mask_values", self.mask_values, "--mask_values 0,255")


@dataclass(frozen=True)
class SegmentationRecipe:
    """How the head, and with it perhaps the encoder, learns.

    Args:
        head: linear, knn (votes of labelled patches, no training) or upernet.
        finetune: train the encoder, too.
        taps: blocks that the head reads: so many spread evenly, or a list from 0 as [3,5,7,11]; 1 unless given, 4 for
            upernet.
        batch_norm: normalise the features of the linear head.
        steps: optimizer steps; 300 on the built-in images and 4000 on others unless given.
        batch_size: crops per step over all devices.
        lr: peak learning rate; 1e-3 for linear and 1e-4 for upernet unless given.
        warmup_steps: of linear warm-up; a tenth of the steps, at most 1500, unless given.
        weight_decay: of AdamW.
        layer_decay: factor per block on the encoder's learning rate.
        drop_path: stochastic depth of the encoder's last block.
        anneal: share of the steps in which a reduction grows to its full strength in a straight line, 0.5 for Cropr;
            with finetune only.
        scale: shorter side of a training image before it is cropped, smallest and largest, times crop.
        k: patches that vote.
        bank: most labelled patches.
        seeds: trainings with other seeds, each beside an encoder that was never trained.
    """

    head: Literal["linear", "knn", "upernet"] = "linear"
    finetune: bool = False
    taps: Count | list[Whole] | None = None
    batch_norm: bool = True
    steps: Count | None = None
    batch_size: Count = 16
    lr: Positive | None = None
    warmup_steps: Whole | None = None
    weight_decay: NotNegative = 0.05
    layer_decay: SomeShare = 0.65
    drop_path: ShareBelowOne = 0.1
    anneal: Share = 0.0
    scale: tuple[Positive, Positive] = (0.5, 2.0)
    k: Count = 20
    bank: Count = 50000
    seeds: Count = 1

    def blocks(self, depth: int) -> list[int]:
        """Numbers of the blocks that the head reads, of an encoder with ``depth`` of them."""
        given = self.taps or (4 if self.head == "upernet" else 1)
        if self.head == "upernet" and depth < 4:
            raise UserError(f"--head upernet reads four blocks, and the encoder has {depth}", hint="--head linear")
        blocks = [depth * (i + 1) // given - 1 for i in range(given)] if isinstance(given, int) else given
        if min(blocks) < 0 or max(blocks) >= depth or sorted(set(blocks)) != blocks:
            why = f"the encoder has blocks 0 to {depth - 1}, and each is named once, in their order"
            raise UserError(f"--taps {given} are no blocks of this encoder", why=why, hint=f"--taps {min(4, depth)}")
        if self.head == "upernet" and len(blocks) != 4:
            raise UserError(f"--taps {given}: UPerNet reads four blocks", hint="--taps 4")
        return blocks


@dataclass(frozen=True)
class Scoring:
    """How images are scored.

    Args:
        inference: slide (a window of the crop's size) or whole (the image at once; positions are resized).
        stride: pixels from window to window; two thirds of the crop unless given.
        scales: sizes at which an image is shown; answers are averaged.
        flip: show the mirror image, too.
        pictures: images drawn with truth and answer.
    """

    inference: Literal["slide", "whole"] = "slide"
    stride: Count | None = None
    scales: tuple[Positive, ...] = (1.0,)
    flip: bool = False
    pictures: Whole = 6


def _numbers(option: str, given: int | str, hint: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in str(given).split(",") if number.strip())
    except ValueError:
        raise UserError(f"{option} {given} is not a list of numbers", hint=hint) from None


def check(options: SegmentationOptions, recipe: SegmentationRecipe, scoring: Scoring) -> None:
    """Refuses what could not work before anything heavy is imported."""
    if recipe.head == "knn" and recipe.finetune:
        raise UserError("--finetune: a k-NN head trains nothing", hint="--head linear --finetune true")
    if recipe.head == "upernet" and recipe.batch_size < 2:
        raise UserError("--batch_size 1: UPerNet normalises over a batch", hint="--batch_size 2")
    check_rising("--scale", recipe.scale)
    if scoring.stride and options.crop and scoring.stride > options.crop:
        raise UserError(f"--stride {scoring.stride} leaves pixels out", hint=f"--stride {options.crop}")
    if options.num_classes is not None and options.num_classes < 2:
        raise UserError(f"--num_classes {options.num_classes}: two or more are needed", hint="--num_classes 2")
    values = options.values
    if values is not None and (
        len(set(values)) < max(2, len(values)) or options.num_classes not in (None, len(values))
    ):
        raise UserError(
            f"--mask_values {options.mask_values} does not name a value for each of "
            f"{options.num_classes or 'two or more'} classes",
            hint="--num_classes 2 --mask_values 0,255",
        )

"""From a model of fixed-size crops to an answer for every pixel of an image of any size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Classify = Callable[[Tensor], Tensor]
"""``(B, C, S, S)`` normalised pixels to ``(B, classes, S, S)`` logits."""


@dataclass(frozen=True)
class Inference:
    """How an image is scored.

    Args:
        mode: ``slide`` moves a window of the training crop's size over the image and averages the logits where windows
            overlap; ``whole`` shows the image at once.
        crop: side of the window.
        stride: pixels from window to window; two thirds of ``crop`` in the published recipes (341 of 512).
        scales: sizes at which the image is shown; probabilities are averaged.
        flip: show its mirror image, too.
        patch: height and width of a patch; a whole image is filled up to a multiple.
        batch: windows at once.
    """

    mode: Literal["slide", "whole"]
    crop: int
    stride: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    patch: tuple[int, int] = (16, 16)
    batch: int = 16


def predict(classify: Classify, images: Tensor, size: tuple[int, int], how: Inference) -> Tensor:
    """Scores of every class for every pixel.

    Args:
        classify: the model.
        images: ``(B, C, H, W)``, normalised.
        size: height and width of the answer: the mask's.
        how: see there.

    Returns:
        ``(B, classes, *size)``: logits, or mean probabilities if the image is shown more than once.
    """
    answers = []
    for scale in how.scales:
        shape = [max(1, round(length * scale)) for length in images.shape[2:]]
        shown = images if scale == 1 else F.interpolate(images, shape, mode="bilinear", antialias=True)
        answers.append(_resize(_show(classify, shown, how), size))
        if how.flip:
            answers.append(_resize(_show(classify, shown.flip(3), how).flip(3), size))
    if len(answers) == 1:
        return answers[0]
    return torch.stack([answer.softmax(1) for answer in answers]).mean(0)


def _show(classify: Classify, images: Tensor, how: Inference) -> Tensor:
    return (
        slide(classify, images, how.crop, how.stride, how.batch)
        if how.mode == "slide"
        else whole(classify, images, how.patch)
    )


def whole(classify: Classify, images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Logits ``(B, classes, H, W)`` of images shown at once, filled with the mean colour up to whole patches."""
    height, width = images.shape[2:]
    filled = F.pad(images, (0, -width % patch[1], 0, -height % patch[0]))
    return classify(filled)[:, :, :height, :width]


def slide(classify: Classify, images: Tensor, crop: int, stride: int, batch: int = 16) -> Tensor:
    """Logits ``(B, classes, H, W)``: the mean over all windows that see a pixel; the last ones end at the border."""
    height, width = images.shape[2:]
    filled = F.pad(images, (0, max(0, crop - width), 0, max(0, crop - height)))
    rows, columns = (_starts(length, crop, stride) for length in filled.shape[2:])
    places = [(top, left) for top in rows for left in columns]
    windows = torch.cat([filled[:, :, top : top + crop, left : left + crop] for top, left in places])
    answers = torch.cat([classify(part).float() for part in torch.split(windows, batch)])
    answers = answers.view(len(places), len(images), *answers.shape[1:])
    total = answers.new_zeros(*answers.shape[1:3], *filled.shape[2:])
    seen = answers.new_zeros(filled.shape[2:])
    for (top, left), answer in zip(places, answers, strict=True):
        total[:, :, top : top + crop, left : left + crop] += answer
        seen[top : top + crop, left : left + crop] += 1
    return (total / seen)[:, :, :height, :width]


def _starts(length: int, crop: int, stride: int) -> list[int]:
    count = -(-(length - crop) // stride) + 1
    return [min(step * stride, length - crop) for step in range(count)]


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    logits = logits.float()
    return logits if logits.shape[2:] == size else F.interpolate(logits, size, mode="bilinear")

"""Drawing ids in a few steps, the surest first (MaskGIT, arXiv:2202.04200, sec. 3.2)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from mim.randomness import RowGenerator

Schedule = Literal["cosine", "linear", "square"]


@dataclass(frozen=True)
class Decoding:
    """How ids are drawn.

    Args:
        steps: how often the network is asked for an image.
        temperature: of the Gumbel noise on the confidence at the first step; it falls to 0 in a straight line. Without
            any, the surest ids come first, and images look alike.
        schedule: how many stay hidden after a step.
    """

    steps: int = 12
    temperature: float = 4.5
    schedule: Schedule = "cosine"


@runtime_checkable
class DrawsImages(Protocol):
    """A method that can say what stands where patches are hidden, and so draws images."""

    def draw_images(
        self, images: Tensor, hidden: Tensor, seed: int, decoding: Decoding = ..., classes: Sequence[int] = ()
    ) -> Tensor:
        """Draws the hidden patches of images; where all are, images out of nothing.

        Args:
            images: ``(B, C, H, W)``, normalised; what is hidden of them may be anything.
            hidden: ``(B, N)`` bool, True = hidden.
            seed: image ``i`` is a function of (seed, i).
            decoding: in which steps.
            classes: labels of what is drawn, in turn; without any, of all kinds.

        Returns:
            ``(B, C, H, W)``, normalised.

        Raises:
            UserError: for classes that it was not trained with.
        """


_HIDDEN: dict[Schedule, Callable[[float], float]] = {
    "cosine": lambda done: math.cos(done * math.pi / 2),
    "linear": lambda done: 1 - done,
    "square": lambda done: 1 - done**2,
}
"""Share of the ids that is still hidden when this share of the steps is done."""


@torch.no_grad()
def decode_iteratively(
    predict: Callable[[Tensor, Tensor], Tensor],
    ids: Tensor,
    hidden: Tensor,
    generator: RowGenerator,
    decoding: Decoding = Decoding(),
) -> Tensor:
    """Fills in hidden ids: each step draws all of them, keeps the surest, and hides the others again.

    Args:
        predict: ids ``(B, N)`` and ``(B, N)`` bool, True = hidden, to logits ``(B, N, V)``.
        ids: ``(B, N)`` int64; those that are hidden may be anything.
        hidden: ``(B, N)`` bool; ids elsewhere are known and never change.
        generator: random numbers of each row, on the same device.
        decoding: how many become known in each of how many steps, and by how much chance.

    Returns:
        ``(B, N)`` int64, nothing hidden.
    """
    asked = hidden.sum(dim=1, keepdim=True)  # (B, 1)
    steps = decoding.steps
    for step in range(1, steps + 1):
        scores = predict(ids, hidden).float().log_softmax(dim=-1)  # (B, N, V)
        drawn = (scores + _gumbel(generator, *scores.shape[1:])).argmax(dim=-1)
        ids = torch.where(hidden, drawn, ids)
        if step == steps:
            break
        confidence = scores.gather(-1, drawn[..., None])[..., 0]
        confidence = confidence + decoding.temperature * (1 - step / steps) * _gumbel(generator, ids.shape[1])
        confidence = torch.where(hidden, confidence, torch.inf)
        count = (asked * _HIDDEN[decoding.schedule](step / steps)).long().clamp(min=1)
        count = torch.minimum(count, hidden.sum(dim=1, keepdim=True) - 1)  # each step makes some id known
        hidden = confidence.argsort(dim=1, stable=True).argsort(dim=1) < count
    return ids


def _gumbel(generator: RowGenerator, *shape: int) -> Tensor:
    """``(B, *shape)`` with Gumbel's distribution: added to logarithms of weights, the largest is drawn by weight."""
    return -(-generator.rand(*shape).clamp(min=1e-7).log()).log()

"""Drawing ids in a few steps, the surest first (MaskGIT, arXiv:2202.04200, sec. 3.2)."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mim.randomness import RowGenerator

Schedule = Literal["cosine", "linear", "square"]

Decoding = tuple[int, float, Schedule]
"""Steps, temperature and schedule of :func:`decode_iteratively`."""

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
    steps: int = 12,
    temperature: float = 4.5,
    schedule: Schedule = "cosine",
) -> Tensor:
    """Fills in hidden ids: each step draws all of them, keeps the surest, and hides the others again.

    Args:
        predict: ids ``(B, N)`` and ``(B, N)`` bool, True = hidden, to logits ``(B, N, V)``.
        ids: ``(B, N)`` int64; those that are hidden may be anything.
        hidden: ``(B, N)`` bool; ids elsewhere are known and never change.
        generator: random numbers of each row, on the same device.
        steps: how often ``predict`` is asked.
        temperature: of the Gumbel noise on the confidence at the first step; it falls to 0 in a straight line. Without
            any, the surest ids come first, and images look alike.
        schedule: how many stay hidden after a step.

    Returns:
        ``(B, N)`` int64, nothing hidden.
    """
    asked = hidden.sum(dim=1, keepdim=True)  # (B, 1)
    for step in range(1, steps + 1):
        scores = predict(ids, hidden).float().log_softmax(dim=-1)  # (B, N, V)
        drawn = (scores + _gumbel(generator, *scores.shape[1:])).argmax(dim=-1)
        ids = torch.where(hidden, drawn, ids)
        if step == steps:
            break
        confidence = scores.gather(-1, drawn[..., None])[..., 0]
        confidence = confidence + temperature * (1 - step / steps) * _gumbel(generator, ids.shape[1])
        confidence = torch.where(hidden, confidence, torch.inf)
        count = (asked * _HIDDEN[schedule](step / steps)).long().clamp(min=1)
        count = torch.minimum(count, hidden.sum(dim=1, keepdim=True) - 1)  # each step makes some id known
        hidden = confidence.argsort(dim=1, stable=True).argsort(dim=1) < count
    return ids


def _gumbel(generator: RowGenerator, *shape: int) -> Tensor:
    """``(B, *shape)`` with Gumbel's distribution: added to logarithms of weights, the largest is drawn by weight."""
    return -(-generator.rand(*shape).clamp(min=1e-7).log()).log()

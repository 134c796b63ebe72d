"""Numbers that change during training, as functions of progress (0 to 1) or of the step; none of them keeps a state."""

import math


def linear(progress: float, start: float, end: float) -> float:
    """Straight line from ``start`` at progress 0 to ``end`` at progress 1."""
    return start + (end - start) * progress


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` at progress 0 to ``end`` at progress 1, flat at both ends."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(step: int, warmup_steps: int, max_steps: int, peak: float, end: float) -> float:
    """Linear from 0 to ``peak`` over the warm-up, then half a cosine to ``end``, reached at ``max_steps`` and kept."""
    if step < warmup_steps:
        return linear(step / warmup_steps, 0.0, peak)
    return cosine(min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps)), peak, end)


def warmup_poly(step: int, warmup_steps: int, max_steps: int, peak: float, power: float = 1.0) -> float:
    """``peak`` times the remaining share of the steps to a power, during the warm-up times a line from 1e-6 to 1."""
    decayed: float = peak * max(0.0, 1 - step / max_steps) ** power
    return decayed * linear(step / warmup_steps, 1e-6, 1.0) if step < warmup_steps else decayed


def between(progress: float, start: float, end: float) -> float:
    """How far ``progress`` has come from ``start`` to ``end``: 0 before, 1 after, and 1 always if both are the same."""
    return min(1.0, max(0.0, (progress - start) / (end - start))) if end > start else 1.0

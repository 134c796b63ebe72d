"""Fits a tokenizer to images, step by step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mim.randomness import keyed_generator
from mim.schedules import warmup_cosine
from mim.tokenizers.base import Tokenizer


def fit(
    tokenizer: Tokenizer, batches: Iterator[Tensor], steps: int, lr: float, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """Trains in place; yields the number of steps done and the loss, a scalar that stays on the device, of each.

    Args:
        tokenizer: with everything to learn.
        batches: images ``(B, 3, H, W)`` in 0..1, ``steps`` of them at least, on its device.
        steps: how many to take.
        lr: largest learning rate of what learns by gradients; it rises over a twentieth of the steps and falls to 0.
        seed: of the vectors at which codes start.
    """
    parameters = list(tokenizer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95)) if parameters else None
    for step, images in zip(range(steps), batches, strict=False):
        generator = keyed_generator(seed, "codes", step)
        if step == 0:
            tokenizer.start(images, generator)
        loss = tokenizer.fit_loss(images, generator)
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(step, max(1, steps // 20), steps, lr, 0.0)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        yield step + 1, loss.detach()


@torch.no_grad()
def reconstruction(tokenizer: Tokenizer, images: Tensor) -> tuple[float, int]:
    """Peak signal-to-noise ratio in dB of images ``(B, 3, H, W)`` that were encoded and decoded, and codes in use."""
    ids = tokenizer.encode(images)
    error = (tokenizer.decode(ids) - images).square().mean()
    return float(-10 * error.clamp(min=1e-10).log10()), len(torch.unique(ids))

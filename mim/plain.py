"""The textbook formulation of every method's loss: what the benchmark compares with, and tests as well.

Nothing is saved here: every patch is embedded, every prediction is made, whether the loss needs it or not.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mim.methods import MAE, Batch, Method
from mim.patches import gather_tokens, patchify, pixel_targets


def plain_mae_loss(method: MAE, batch: Batch) -> Tensor:
    """MAE as the paper describes it, nothing saved: embed all, shuffle, predict all, weigh errors by the mask."""
    (images,), _ = batch
    vit, fill, trunk, prefix = method.encoder.vit, method.decoder.fill, method.decoder.trunk, method.encoder.num_prefix
    mask = method.masking(len(images), method.encoder.grid, generator=method.row_generator(len(images), 0))  # (B, N)
    order = mask.byte().argsort(dim=1, stable=True)
    restore = order.argsort(dim=1)
    tokens = vit._pos_embed(vit.patch_embed(images))  # (B, P + N, D)
    visible = gather_tokens(tokens[:, prefix:], order[:, : method.visible_count])  # (B, K, D)
    latent = vit.norm(vit.blocks(vit.norm_pre(torch.cat([tokens[:, :prefix], visible], dim=1))))
    latent = fill.project(latent)  # (B, P + K, E)
    hidden = fill.mask_token.to(latent.dtype).expand(len(images), mask.shape[1] - method.visible_count, -1)
    patches = gather_tokens(torch.cat([latent[:, prefix:], hidden], dim=1), restore)  # (B, N, E)
    sequence = torch.cat([latent[:, :prefix], patches], dim=1) + fill.positions
    prediction = trunk.predict(trunk.norm(trunk.blocks(sequence)))[:, prefix:]  # (B, N, p*p*C)
    target = (pixel_targets if method.target.standardise else patchify)(images, method.encoder.patch_size)
    error = (prediction - target).square().mean(dim=-1)  # (B, N)
    loss: Tensor = (error * mask).sum() / mask.sum()
    return loss


PLAIN_LOSSES: dict[type[Method], Callable[[Any, Batch], Tensor]] = {MAE: plain_mae_loss}
"""The forward passes that a method's own can be compared with."""

"""The textbook formulation of every method's loss: what the benchmark compares with, and tests as well.

Nothing is saved here: every patch is embedded, every prediction is made, whether the loss needs it or not.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mim.encoder import Encoder
from mim.layers.decoder import FillMasked, Trunk
from mim.methods import HPM, MAE, Batch, Method
from mim.patches import gather_tokens, patchify, pixel_targets, visible_indices


def plain_mae_loss(method: MAE, batch: Batch) -> Tensor:
    """MAE as the paper describes it, nothing saved: embed all, shuffle, predict all, weigh errors by the mask."""
    (images,), _ = batch
    mask = method.masking(len(images), method.encoder.grid, generator=method.row_generator(len(images), 0))  # (B, N)
    sequence = _filled(method.encoder, method.decoder.fill, images, mask, method.visible_count)
    prediction = _all_predictions(method.decoder.trunk, sequence)  # (B, N, p*p*C)
    target = (pixel_targets if method.target.standardise else patchify)(images, method.encoder.patch_size)
    error = (prediction - target).square().mean(dim=-1)  # (B, N)
    loss: Tensor = (error * mask).sum() / mask.sum()
    return loss


def plain_hpm_loss(method: HPM, batch: Batch) -> Tensor:
    """HPM likewise; the teacher reconstructs what nobody looks at, and every pair is compared in both orders."""
    (images,), _ = batch
    grid, count = method.encoder.grid, len(images)
    with torch.no_grad():
        judge = method.teacher.module
        nothing = torch.zeros(count, method.patches, dtype=torch.bool, device=images.device)
        sequence = _filled(judge["encoder"], judge["fill"], images, nothing, method.patches)
        _all_predictions(method.reconstruction, sequence)
        scores = _all_predictions(judge["difficulty"], sequence).float().mean(dim=-1)  # (B, N)
    mask = method.draw(scores, count, method.row_generator(count, 0))  # (B, N)
    sequence = _filled(method.encoder, method.fill, images, mask, method.visible_count)
    everything = torch.arange(method.patches, device=images.device).expand(count, -1)
    target = method.target(images, grid, everything)
    error = method.target.error(_all_predictions(method.reconstruction, sequence), target)  # (B, N)
    difficulty = _all_predictions(method.difficulty, sequence).float().mean(dim=-1)  # (B, N)
    hidden = visible_indices(~mask, method.patches - method.visible_count)
    difficulty, truth = difficulty.gather(1, hidden), error.detach().gather(1, hidden)  # (B, M)
    harder = truth[:, None, :] > truth[:, :, None]  # (B, M, M)
    valid = truth[:, None, :] != truth[:, :, None]
    probability = (difficulty[:, None, :] - difficulty[:, :, None]).sigmoid()
    loss = -(harder * (probability + 1e-6).log() + ~harder * (1 - probability + 1e-6).log())
    total: Tensor = (error * mask).sum() / mask.sum() + (loss * valid).sum() / valid.sum()
    return total


def _filled(encoder: Encoder, fill: FillMasked, images: Tensor, mask: Tensor, visible_count: int) -> Tensor:
    """Embed all patches, keep the visible ones, encode, put mask tokens between them: ``(B, P + N, E)``."""
    vit, prefix = encoder.vit, encoder.num_prefix
    order = mask.byte().argsort(dim=1, stable=True)
    restore = order.argsort(dim=1)
    tokens = vit._pos_embed(vit.patch_embed(images))  # (B, P + N, D)
    visible = gather_tokens(tokens[:, prefix:], order[:, :visible_count])  # (B, K, D)
    latent = vit.norm(vit.blocks(vit.norm_pre(torch.cat([tokens[:, :prefix], visible], dim=1))))
    latent = fill.project(latent)  # (B, P + K, E)
    hidden = fill.mask_token.to(latent.dtype).expand(len(images), mask.shape[1] - visible_count, -1)
    patches = gather_tokens(torch.cat([latent[:, prefix:], hidden], dim=1), restore)  # (B, N, E)
    sequence: Tensor = torch.cat([latent[:, :prefix], patches], dim=1) + fill.positions
    return sequence


def _all_predictions(trunk: Trunk, sequence: Tensor) -> Tensor:
    """``(B, P + N, E)`` to ``(B, N, out_dim)``; what the prefix predicts is dropped."""
    prediction: Tensor = trunk.predict(trunk.norm(trunk.blocks(sequence)))[:, trunk.num_prefix :]
    return prediction


PLAIN_LOSSES: dict[type[Method], Callable[[Any, Batch], Tensor]] = {HPM: plain_hpm_loss, MAE: plain_mae_loss}
"""The forward passes that a method's own can be compared with."""

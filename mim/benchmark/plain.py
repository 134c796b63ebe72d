"""The textbook formulation of every method's loss: what the benchmark compares with, and tests as well.

Nothing is saved here: every patch is embedded, every prediction is made, whether the loss needs it or not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mim.encoder import Encoder
from mim.errors import UserError
from mim.layers.decoder import Decoder, FillMasked, Trunk
from mim.layers.distillation import STUDENT_TEMPERATURE
from mim.layers.prototypes import Head
from mim.methods import HPM, IBOT, MAE, Batch, Method
from mim.patches import gather_tokens, visible_indices


def plain_mae_loss(method: MAE, batch: Batch) -> Tensor:
    """MAE as the paper describes it, nothing saved: embed all, shuffle, predict all, weigh errors by the mask."""
    (images,) = batch[0]
    if not isinstance(method.decoder, Decoder):
        raise UserError(
            "--against plain: MAE has no plain formulation with cross-attention",
            hint="--against mae/demo   or another recipe",
        )
    mask = method.masking(len(images), method.encoder.grid, generator=method.row_generator(len(images), 0))  # (B, N)
    sequence = _filled(method.encoder, method.decoder.fill, images, mask, method.visible_count)
    prediction = _all_predictions(method.decoder.trunk, sequence)  # (B, N, p*p*C)
    everything = torch.arange(mask.shape[1], device=images.device).expand(len(images), -1)
    error = method.target.error(prediction, method.target(images, method.encoder.grid, everything))  # (B, N)
    loss: Tensor = (error * mask).sum() / mask.sum()
    return loss


def plain_hpm_loss(method: HPM, batch: Batch) -> Tensor:
    """HPM likewise; the teacher reconstructs what nobody looks at, and every pair is compared in both orders."""
    (images,) = batch[0]
    grid, count = method.encoder.grid, len(images)
    with torch.no_grad():
        judge = method.teacher.module
        nothing = torch.zeros(count, method.patches, dtype=torch.bool, device=images.device)
        sequence = _filled(judge["encoder"], judge["fill"], images, nothing, method.patches)
        _all_predictions(method.reconstruction, sequence)
        scores = _all_predictions(judge["difficulty"], sequence).float().mean(dim=-1)  # (B, N)
    mask = method.draw_mask(method.row_generator(count, 0), scores)  # (B, N)
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


def plain_ibot_loss(method: IBOT, batch: Batch) -> Tensor:
    """The loss of iBOT as written: every token meets every prototype, for student and teacher."""
    views, labels = batch[:2]
    images, count, teacher = torch.cat(views[:2]), len(labels), method.teacher.module
    if method.teaching.center != "all" or method.koleo.weight or method.head.patch_mlp is not None:
        raise UserError(
            "--against plain: the parts of DINOv2 have no plain formulation",
            hint="--against mae/demo   or another recipe",
        )
    with torch.no_grad():
        if method.masking.guided:
            tokens, scores = method.evaluated.forward_with_attention(images)
        else:
            tokens, scores = method.evaluated(images), None
        taught, taught_patches = _all_logits(teacher["head"], tokens, method.encoder.num_prefix)
        means = torch.stack([taught.mean(dim=0), taught_patches.mean(dim=(0, 1))])
        method.mean_logits.append((means, torch.ones_like(means[:, :1])))
        center, patch_center = method.centers
        targets = ((taught - center) / method.temperature(method.teaching.temperature)).softmax(dim=-1)
        patch_temperature = method.temperature(method.teaching.patch_temperature)
        patch_targets = ((taught_patches - patch_center) / patch_temperature).softmax(dim=-1)  # (2B, N, K)
        mask = method.draw_masks(count, scores, 0).to(images.device)
    tokens = method.encoder(images, mask, method.mask_token)
    logits, patch_logits = _all_logits(method.head, tokens, method.encoder.num_prefix)
    student = [*logits.chunk(2)]
    if views[2:]:
        small = method.encoder(torch.cat(views[2:]))
        student += _all_logits(method.head, small, method.encoder.num_prefix)[0].chunk(len(views) - 2)
    pairs = [
        -(target * (student[view] / STUDENT_TEMPERATURE).log_softmax(dim=-1)).sum(dim=-1).mean()
        for teacher_view, target in enumerate(targets.chunk(2))
        for view in range(len(views))
        if view != teacher_view
    ]
    errors = -(patch_targets * (patch_logits / STUDENT_TEMPERATURE).log_softmax(dim=-1)).sum(dim=-1)  # (2B, N)
    patch_loss = (errors * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    total: Tensor = torch.stack(pairs).mean() + patch_loss.mean()
    return total


def _all_logits(head: Head, tokens: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Logits of the class token ``(B, K)`` and of all patches ``(B, N, K)``."""
    points = head(tokens)
    return (points[:, 0] @ head.for_classes().T).float(), (points[:, prefix:] @ head.for_patches().T).float()


def _filled(encoder: Encoder, fill: FillMasked, images: Tensor, mask: Tensor, visible_count: int) -> Tensor:
    """Embed all patches, keep the visible ones, encode, put mask tokens between them: ``(B, P + N, E)``."""
    vit, prefix = encoder.vit, encoder.num_prefix
    order = mask.byte().argsort(dim=1, stable=True)
    restore = order.argsort(dim=1)
    embedded = vit._pos_embed(vit.patch_embed(images))  # (B, P + N, D), and rotary positions where there are any
    tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    visible = gather_tokens(tokens[:, prefix:], order[:, :visible_count])  # (B, K, D)
    latent = vit.norm_pre(torch.cat([tokens[:, :prefix], visible], dim=1))
    for block, turned in zip(vit.blocks, _ropes(rope, order[:, :visible_count], len(vit.blocks)), strict=True):
        latent = block(latent) if turned is None else block(latent, rope=turned)
    latent = fill.project(vit.norm(latent))  # (B, P + K, E)
    hidden = fill.mask_token.to(latent.dtype).expand(len(images), mask.shape[1] - visible_count, -1)
    patches = gather_tokens(torch.cat([latent[:, prefix:], hidden], dim=1), restore)  # (B, N, E)
    sequence: Tensor = torch.cat([latent[:, :prefix], patches], dim=1) + fill.positions
    return sequence


def _ropes(rope: Tensor | None, visible: Tensor, depth: int) -> Sequence[Tensor | None]:
    """Rotary positions of the visible patches for every block, ``(B, 1 or heads, K, 2d)``."""
    if rope is None:
        return [None] * depth
    if rope.ndim == 2:  # (N, 2d), the same in every block
        return [rope[visible][:, None]] * depth
    return [table[:, visible].transpose(0, 1) for table in rope]  # (heads, N, 2d) each


def _all_predictions(trunk: Trunk, sequence: Tensor) -> Tensor:
    """``(B, P + N, E)`` to ``(B, N, out_dim)``; what the prefix predicts is dropped."""
    prediction: Tensor = trunk.predict(trunk.norm(trunk.blocks(sequence)))[:, trunk.num_prefix :]
    return prediction


PLAIN_LOSSES: dict[type[Method], Callable[[Any, Batch], Tensor]] = {
    IBOT: plain_ibot_loss,
    HPM: plain_hpm_loss,
    MAE: plain_mae_loss,
}
"""The forward passes that a method's own can be compared with."""

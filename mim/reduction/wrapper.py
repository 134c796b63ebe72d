"""A timm ViT that runs faster on fewer tokens, for those who use nothing else of this project."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim.reduction.base import TokenReduction
from mim.reduction.tokens import Tokens, weighted_mean


class TokenReducedViT(nn.Module):
    """A timm model with a token reduction inside; its weights, its head and its inputs stay as they are.

    The model is wrapped, not changed: ``wrapper.vit`` can be used on its own at any time. With nothing to reduce,
    outputs are those of timm to the bit.

    Args:
        vit: of timm's plain ViTs (with registers, without class token, distilled, ...) or of its ``Eva`` family with
            rotary positions (EVA, EVA-02, DINOv3).
        reduction: how the sequence is shortened.

    Raises:
        TypeError: if this model cannot be reduced in this way.
    """

    def __init__(self, vit: nn.Module, reduction: TokenReduction) -> None:
        super().__init__()
        check_reducible(vit)
        reduction.check(vit)
        self.vit: Any = vit
        self.reduction = reduction
        self.train(vit.training)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to what the model's head makes of them, ``(B, num_classes)``."""
        tokens = self.forward_tokens(images)
        return self.forward_head(tokens)

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens that are left, ``(B, P + K, D)``: prefix, then patches in the reduction's own order."""
        return self.forward_tokens(images).x

    def forward_dense(self, images: Tensor) -> Tensor:
        """Normalised features of every patch where it lies in the image, ``(B, D, h, w)``."""
        tokens = self._reduced(images)
        dense: Tensor = self.vit.norm(tokens.dense())  # (B, N, D)
        assert tokens.grid is not None
        return dense.transpose(1, 2).reshape(images.shape[0], -1, *tokens.grid)

    def forward_tokens(self, images: Tensor) -> Tokens:
        """The normalised tokens with the map that tells what each patch has become."""
        tokens = self._reduced(images)
        return tokens.with_x(self.vit.norm(tokens.x))

    def forward_head(self, tokens: Tokens) -> Tensor:
        """Pooling and head of the model; a mean over patches counts merged tokens by their size."""
        vit = self.vit
        if not tokens.uneven or not (_pools(vit) or vit.global_pool in ("avg", "avgmax", "max")):
            head: Tensor = vit.forward_head(tokens.x)
            return head
        logits: Tensor = vit.head(vit.head_drop(vit.fc_norm(pool(vit, tokens))))
        return logits

    def auxiliary_loss(self, tokens: Tokens, labels: Tensor) -> Tensor:
        """What a trained reduction adds to the loss, from the tokens of ``forward_tokens`` in training mode."""
        return self.reduction.auxiliary_loss(tokens, labels)

    def static(self, images: Tensor) -> TokenReduction:
        """The reduction with numbers that are known beforehand, those of a batch where each image has its own."""
        x, _, rope = self._embedded(images)
        return self.reduction.static(self.vit.blocks, x, self.vit.num_prefix_tokens, rope)

    def _embedded(self, images: Tensor) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """What enters the first block, its grid, and rotary positions."""
        vit = self.vit
        patches = vit.patch_embed(images)
        embedded = vit._pos_embed(patches)
        x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
        x = vit.patch_drop(x) if isinstance(vit, VisionTransformer) else x  # others do so while they embed
        grid = vit.patch_embed.dynamic_feat_size(images.shape[-2:])
        if x.shape[1] - vit.num_prefix_tokens != grid[0] * grid[1]:
            raise ValueError("this model drops patches by itself in training; set its patch_drop_rate to 0")
        return vit.norm_pre(x), grid, rope

    def _reduced(self, images: Tensor) -> Tokens:
        vit, (x, grid, rope) = self.vit, self._embedded(images)
        reduced: Tokens = self.reduction(
            vit.blocks, x, vit.num_prefix_tokens, grid, rope, vit.grad_checkpointing and self.training
        )
        return reduced


def pool(vit: Any, tokens: Tokens) -> Tensor:  # noqa: ANN401 - a timm model
    """Pooled features ``(B, D)`` of merged tokens, where timm would count each of them once.

    Args:
        vit: whose kind of pooling is used: attention pooling, ``avg``, ``avgmax`` or ``max``.
        tokens: after the final norm.
    """
    everything = _pools(vit) if isinstance(vit, Eva) else vit.pool_include_prefix
    prefix = tokens.num_prefix if everything else 0
    x = tokens.x[:, tokens.num_prefix - prefix :]
    sizes = F.pad(tokens.sizes, (prefix, 0), value=1.0)  # (B, prefix + K)
    if _pools(vit):
        pooled: Tensor = vit.attn_pool(x, attn_mask=sizes.log()[:, None, None].to(x.dtype))
        return pooled
    mean = weighted_mean(x, sizes)
    if vit.global_pool == "avg":
        return mean
    largest = x.masked_fill(sizes[..., None] == 0, -torch.inf).amax(dim=1)
    return largest if vit.global_pool == "max" else 0.5 * (mean + largest)


def check_reducible(vit: nn.Module) -> None:
    """Raises ``TypeError`` for a model that is no ViT, or whose head pools the whole grid."""
    if not isinstance(vit, VisionTransformer | Eva):
        raise TypeError(f"{type(vit).__name__} is neither a plain ViT nor of the Eva family")
    if _pools(vit) and not isinstance(vit.attn_pool, AttentionPoolLatent):
        raise TypeError(f"{type(vit.attn_pool).__name__} pools the whole grid; use forward_dense of another head")


def _pools(vit: nn.Module) -> bool:
    return getattr(vit, "attn_pool", None) is not None

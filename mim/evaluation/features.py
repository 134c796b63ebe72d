"""One vector per image from a frozen encoder."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mim.encoder import Encoder
from mim.reduction.tokens import Tokens

Pool = Literal["cls", "mean"]
POOLED = {"cls": "class token", "mean": "mean of patch tokens", "tokens": "all patch tokens"}
"""What a pool is called where numbers are shown."""


def pooled_features(encoder: Encoder, images: Tensor, pool: Pool = "cls") -> Tensor:
    """Features after the final norm, one vector per image.

    Args:
        encoder: called as it is: its mode, and whether gradients flow, are the caller's choice.
        images: ``(B, C, H, W)``, normalised.
        pool: ``cls``, the class token (MAE's and iBOT's own protocols), or ``mean`` over the patch tokens.

    Returns:
        ``(B, D)`` float32, also under autocast.

    Raises:
        ValueError: for ``cls`` if the model has no class token.
    """
    if pool == "cls" and not encoder.has_class_token:
        raise ValueError("this model has no class token to pool; use pool='mean'")
    tokens = encoder.forward_tokens(images)
    tokens = tokens.with_x(tokens.x.float())  # (B, P + N, D)
    if pool == "cls":
        return tokens.x[:, 0].clone()  # a view would keep every token in memory
    return encoder.mean_of(tokens).float()


def extract(
    encoder: Encoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    pool: Pool = "cls",
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Features and labels of all batches, in order; only these stay in memory.

    Runs in evaluation mode without gradients, under the caller's autocast; every module gets its own mode back.

    Args:
        encoder: lies on ``device``.
        batches: pairs of normalised images ``(B, C, H, W)`` and labels ``(B,)``.
        pool: see :func:`pooled_features`.
        device: where batches are sent and where the features stay.

    Returns:
        ``(M, D)`` float32 and ``(M,)`` int64, for the M images of all batches.

    Raises:
        ValueError: if there is no batch, or a feature is NaN or infinite: scores computed from it would mean nothing.
    """
    features, labels = [], []
    with evaluating(encoder), torch.inference_mode():
        for images, targets in batches:
            features.append(pooled_features(encoder, images.to(device, non_blocking=True), pool))
            labels.append(targets.to(device, torch.int64))
    torch.clear_autocast_cache()  # weights cast in here carry no gradient; a caller that trains must not meet them
    if not features:
        raise ValueError("no images to extract features from: the batches are empty")
    joined = torch.cat(features)
    if not joined.isfinite().all():
        raise ValueError("the encoder's features hold NaN or infinite values; its weights have diverged")
    return joined, torch.cat(labels)


@dataclass(frozen=True)
class Features:
    """Which numbers of an encoder are its features; all come after the final norm, whatever the block.

    Args:
        layers: last blocks that are read; their vectors are put end to end. iBOT reads 4 of a ViT-S and 1 of a ViT-B.
        pool: ``cls`` the class token, ``mean`` the average of the patch tokens, ``both`` the class tokens and the last
            block's average, ``tokens`` every patch token of the last block, one by one.
    """

    layers: int = 1
    pool: Literal["cls", "mean", "both", "tokens"] = "cls"

    def shape(self, encoder: Encoder) -> tuple[int, ...]:
        """Of one image's features: ``(F,)``, or ``(N, D)`` for tokens.

        Raises:
            ValueError: if the encoder has no class token, or fewer blocks.
        """
        depth = encoder.depth
        if not 1 <= self.layers <= depth or (self.pool == "tokens" and self.layers > 1):
            raise ValueError(f"{self.layers} layers cannot be read with pool={self.pool} from {depth} blocks")
        if self.pool in ("cls", "both") and not encoder.has_class_token:
            raise ValueError("this model has no class token to pool; use pool='mean'")
        if self.pool == "tokens":
            return encoder.grid[0] * encoder.grid[1], encoder.dim
        return ((self.layers + (self.pool == "both")) * encoder.dim,)

    def of(self, encoder: Encoder, images: Tensor) -> Tensor:
        """Features ``(B, F)``, or ``(B, N, D)``, float32, of normalised images ``(B, C, H, W)``.

        With a reduction, means count merged tokens by their size, and patch tokens are put back where they belong.
        """
        return self._pooled(encoder, self._outputs(encoder, images))

    def with_patches(self, encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`of`, and the last block's patch tokens where they lie: ``(B, F)`` and ``(B, h, w, D)``, float32."""
        outputs = self._outputs(encoder, images)
        return self._pooled(encoder, outputs), encoder.dense(outputs[-1]).permute(0, 2, 3, 1).float()

    def _outputs(self, encoder: Encoder, images: Tensor) -> list[Tokens]:
        depth = encoder.depth
        return encoder.after_blocks(images, range(depth - self.layers, depth))

    def _pooled(self, encoder: Encoder, outputs: list[Tokens]) -> Tensor:
        if self.pool == "tokens":
            return encoder.dense(outputs[-1]).flatten(2).transpose(1, 2).float()
        layers = [tokens.with_x(encoder.normed(tokens.x).float()) for tokens in outputs]
        last = encoder.mean_of(layers[-1])
        if self.pool == "mean":
            return torch.cat([*(tokens.patch_mean() for tokens in layers[:-1]), last.float()], dim=1)
        classes = [tokens.x[:, 0] for tokens in layers]
        return torch.cat([*classes, last.float()] if self.pool == "both" else classes, dim=1)

    def describe(self) -> str:
        """In words, for the line that states the protocol."""
        blocks = "last block" if self.layers == 1 else f"last {self.layers} blocks"
        return f"{POOLED.get(self.pool, 'class token and mean of patch tokens')} of the {blocks}"


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each submodule's own mode, as frozen parts may differ from the whole."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training

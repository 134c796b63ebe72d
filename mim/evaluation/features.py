"""One vector per image from a frozen encoder."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from mim.encoder import Encoder

Pool = Literal["cls", "mean"]


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
    if pool == "cls" and not encoder.vit.has_class_token:
        raise ValueError("this model has no class token to pool; use pool='mean'")
    tokens = encoder.forward_tokens(images)
    tokens = tokens.with_x(tokens.x.float())  # (B, P + N, D)
    if pool == "cls":
        return tokens.x[:, 0].clone()  # a view would keep every token in memory
    # Models made for mean pooling have their final norm behind it; elsewhere fc_norm is the identity.
    mean: Tensor = encoder.vit.fc_norm(tokens.patch_mean())
    return mean.float()


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
    with _evaluating(encoder), torch.inference_mode():
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


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each submodule's own mode, as frozen parts may differ from the whole."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training

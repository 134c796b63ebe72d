"""Which patches an answer rests on: attention rollout, TokenTM and Grad-CAM as maps over the patches.

Grad-CAM explains the score of one class, the other two explain what the model looks at for whatever it answers.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.conv_encoder import ConvEncoder
from mim.encoder import Encoder
from mim.reduction.attention import Attending

Explanation = Callable[[Encoder, Tensor, Tensor], Tensor]
"""From an encoder with its classifier, images ``(B, C, H, W)`` and the classes to explain ``(B,)`` to ``(B, h, w)``."""


@torch.no_grad()
def classify(encoder: Encoder, images: Tensor) -> Tensor:
    """Logits ``(B, classes)`` of the classifier that timm's model has."""
    return cast(Tensor, cast(Any, encoder.vit)(images))


@torch.no_grad()
def rollout(encoder: Encoder, images: Tensor, classes: Tensor) -> Tensor:
    """Attention rollout (arXiv:2005.00928): how much of each patch reaches the answer, residuals counting as much.

    In each block the mean over heads plus the identity, its rows summing to 1, multiplied from the first block on.
    """
    reached: Tensor | None = None
    for _, attending, _ in _blocks(encoder, images):
        attention = attending.whole_attention().mean(dim=1)  # (B, P + N, P + N)
        step = F.normalize(attention + torch.eye(attention.shape[1], device=attention.device), p=1.0, dim=2)
        reached = step if reached is None else step @ reached
    assert reached is not None
    return _answering(encoder, reached)


@torch.no_grad()
def token_tm(encoder: Encoder, images: Tensor, classes: Tensor) -> Tensor:
    """TokenTM (CVPR 2024), the plainest reading of it and no reproduction: rollout that knows how tokens change.

    Relevance starts as the diagonal of the tokens' lengths. A block adds attention times relevance, each token that is
    attended to weighted by its length behind the block over that before it, times the exponential of the cosine between
    the two, which is 1 in the mean over the tokens.
    """
    relevance: Tensor | None = None
    for before, attending, behind in _blocks(encoder, images):
        before, behind = before.float(), behind.float()
        if relevance is None:
            relevance = before.norm(dim=2).diag_embed()  # (B, P + N, P + N)
        longer = behind.norm(dim=2) / before.norm(dim=2).clamp(min=1e-12)
        direction = F.cosine_similarity(before, behind, dim=2).exp()
        weight = longer * direction / direction.mean(dim=1, keepdim=True)  # (B, P + N)
        attention = attending.whole_attention().mean(dim=1)
        relevance = relevance + (attention * weight[:, None]) @ relevance
    assert relevance is not None
    return _answering(encoder, relevance)


def grad_cam(encoder: Encoder, images: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM (arXiv:1610.02391): how far tokens lie along the gradient of the class's score, 0 where against it.

    Of a ViT the patch tokens that enter its last block, since behind it a class token is read alone; of a conv net its
    last map. Their gradients' mean over the places weighs the channels.
    """
    if isinstance(encoder, ConvEncoder):
        net = cast(Any, encoder.vit)
        with torch.no_grad():
            features = net.forward_features(images)
        features = features.requires_grad_()
        gradient = _gradient(net.forward_head(features), features, classes)  # (B, D, h, w)
        return (gradient.mean(dim=(2, 3), keepdim=True) * features.detach()).sum(dim=1).clamp(min=0)
    with torch.no_grad():
        tokens = encoder.before_last_block(images)
    x = tokens.x.detach().requires_grad_()
    logits = cast(Any, encoder.vit).forward_head(encoder.last_block(tokens.with_x(x)))
    patches = slice(encoder.num_prefix, None)
    weights = _gradient(logits, x, classes)[:, patches].mean(dim=1, keepdim=True)  # (B, 1, D)
    return (weights * x.detach()[:, patches]).sum(dim=2).clamp(min=0).view(-1, *encoder.grid)


EXPLANATIONS: dict[str, Explanation] = {"rollout": rollout, "tokentm": token_tm, "gradcam": grad_cam}
"""By the name that ``--explain`` takes."""


def _blocks(encoder: Encoder, images: Tensor) -> Iterator[tuple[Tensor, Attending, Tensor]]:
    if isinstance(encoder, ConvEncoder):
        raise TypeError(f"timm's {type(encoder.vit).__name__} has no attention")
    return encoder.block_by_block(images)


def _answering(encoder: Encoder, relevance: Tensor) -> Tensor:
    """The rows ``(B, P + N, P + N)`` that the answer is read from, for the patches: ``(B, h, w)``."""
    prefix = encoder.num_prefix
    rows = relevance[:, :1] if encoder.pool == "cls" else relevance[:, prefix:]
    return rows[:, :, prefix:].mean(dim=1).view(-1, *encoder.grid)


def _gradient(logits: Tensor, features: Tensor, classes: Tensor) -> Tensor:
    """Of each image's score for its class."""
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features)
    return gradient

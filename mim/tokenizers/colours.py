"""ColorAdapt: an image of tokens in the colours of another (SeiT++, arXiv:2312.10105)."""

import torch
from torch import Tensor


def recoloured(vectors: Tensor, donors: Tensor) -> Tensor:
    """``vectors`` with the mean and deviation over places that ``donors`` have, channel by channel.

    Args:
        vectors: ``(B, h, w, E)``, what the ids of an image stand for.
        donors: ``(B, h, w, E)``, those of the image whose colours each is to have.
    """
    (std, mean), (other_std, other_mean) = (
        torch.std_mean(maps, dim=(1, 2), keepdim=True, correction=0) for maps in (vectors, donors)
    )
    # A channel that is the same everywhere has no deviation to divide by; it becomes the other's mean.
    return (vectors - mean) / std.clamp(min=1e-6) * other_std + other_mean

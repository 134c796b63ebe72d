"""A small convolutional autoencoder around a codebook (VQ-VAE, arXiv:1711.00937)."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mim.tokenizers.base import Tokenizer
from mim.tokenizers.codebook import Codebook

_COMMITMENT = 0.25  # weight of the encoder's distance to its codes in the paper


class ConvTokenizer(Tokenizer):
    """Strided convolutions down to a token, the nearest code in its place, and the same way back.

    Gradients pass the rounding as if it were not there (straight through); codes are moving averages.

    Args:
        codes: number of ids ``V``.
        stride: pixels per token and side; a power of 2.
        width: channels of the convolutions.
        dim: width of a code, ``E``.
    """

    kind = "convolutional"

    def __init__(self, codes: int = 512, stride: int = 4, width: int = 64, dim: int = 32) -> None:
        super().__init__()
        if stride < 2 or stride & (stride - 1):
            raise ValueError(f"stride {stride} is no power of 2 that convolutions of stride 2 reach")
        self.stride, self.width = stride, width
        halvings = int(math.log2(stride))
        down = [_halve(3 if not number else width, width) for number in range(halvings)]
        self.encoder = nn.Sequential(*down, Residual(width), nn.Conv2d(width, dim, 1))
        self.codebook = Codebook(codes, dim)
        up = [_double(width, width) for _ in range(halvings - 1)]
        last = nn.ConvTranspose2d(width, 3, 4, 2, 1)
        self.decoder = nn.Sequential(nn.Conv2d(dim, width, 3, 1, 1), Residual(width), *up, last)

    def settings(self) -> dict[str, Any]:
        """See :meth:`Tokenizer.settings`."""
        return {"codes": self.codes, "stride": self.stride, "width": self.width, "dim": self.codebook.codes.shape[1]}

    def embed(self, images: Tensor) -> Tensor:
        """See :meth:`Tokenizer.embed`."""
        vectors: Tensor = self.encoder(images * 2 - 1)
        return vectors.permute(0, 2, 3, 1)

    def draw(self, vectors: Tensor) -> Tensor:
        """See :meth:`Tokenizer.draw`."""
        images: Tensor = self.decoder(vectors.permute(0, 3, 1, 2))
        return images / 2 + 0.5

    def reconstruction_loss(self, images: Tensor, vectors: Tensor, ids: Tensor) -> Tensor:
        """Squared error of pixels between -1 and 1, and that of the vectors from their codes."""
        codes = self.codebook(ids)
        through = vectors + (codes - vectors).detach()
        return 4 * F.mse_loss(self.draw(through), images) + _COMMITMENT * F.mse_loss(vectors, codes)


class Residual(nn.Module):
    """Two convolutions beside the identity.

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, width, h, w)`` to the same."""
        changed: Tensor = self.inner(maps)
        return maps + changed


def _halve(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, width, 4, 2, 1), nn.ReLU())


def _double(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(inputs, width, 4, 2, 1), nn.ReLU())

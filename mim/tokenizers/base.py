"""What every tokenizer is: images to ids and back."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mim.patches import unpatchify
from mim.tokenizers.codebook import Codebook


class Tokenizer(nn.Module, ABC):
    """Images ``(B, 3, H, W)`` in 0..1 as ids ``(B, h, w)`` of a codebook, one for ``stride x stride`` pixels.

    Attributes:
        kind: its name in files.
        stride: pixels per token and side.
        codebook: the vectors that ids stand for.
    """

    kind: ClassVar[str]
    stride: int
    codebook: Codebook

    @property
    def codes(self) -> int:
        """Number of ids ``V``."""
        return len(self.codebook)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Arguments that build it again."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Vectors ``(B, h, w, E)`` of images ``(B, 3, H, W)`` before they are rounded to codes."""

    @abstractmethod
    def draw(self, vectors: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` of vectors ``(B, h, w, E)``, not yet cut to 0..1."""

    @abstractmethod
    def tiles(self) -> Tensor:
        """What each code looks like by itself, ``(V, p*p*3)`` in the order of :func:`mim.patches.patchify`."""

    def fit_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """One step of fitting: moves the codebook; returns a loss for what learns by gradients.

        Args:
            images: ``(B, 3, H, W)`` in 0..1.
            generator: of this step, on the CPU.
        """
        vectors = self.embed(images)
        ids = self.codebook.nearest(vectors)
        loss = self.reconstruction_loss(images, vectors, ids)
        self.codebook.update(vectors.detach().flatten(0, 2), ids.flatten(), generator)
        return loss

    def reconstruction_loss(self, images: Tensor, vectors: Tensor, ids: Tensor) -> Tensor:
        """A scalar for what learns by gradients; without such parts, how far images are from what becomes of them."""
        return (self.draw(self.codebook(ids)) - images).square().mean()

    def start(self, images: Tensor, generator: torch.Generator) -> None:
        """Takes first codes from images ``(B, 3, H, W)``."""
        with torch.no_grad():
            self.codebook.start(self.embed(images).flatten(0, 2), generator)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Ids ``(B, h, w)`` int64 of images ``(B, 3, H, W)`` in 0..1."""
        return self.codebook.nearest(self.embed(images))

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` in 0..1 of ids ``(B, h, w)``."""
        return self.draw(self.codebook(ids)).clamp(0, 1)

    @torch.no_grad()
    def mosaic(self, ids: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` in which every token of ``ids (B, h, w)`` looks as it does by itself.

        A pixel tells of its own token alone, whatever the tokenizer: what is hidden cannot leak into what is seen.
        """
        tiles = torch.nn.functional.embedding(ids.flatten(1), self.tiles())  # (B, h*w, p*p*3)
        return unpatchify(tiles, (ids.shape[1], ids.shape[2]), self.stride)

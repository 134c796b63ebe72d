"""What every tokenizer is: images to ids and back."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mim.patches import patchify, unpatchify
from mim.tokenizers.codebook import Codebook

_AT_ONCE = 256  # codes that are drawn together


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
    _drawn: dict[tuple[torch.device, torch.dtype], Tensor] | None = None

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

    def tiles(self) -> Tensor:
        """What each code looks like by itself, ``(V, p*p*3)`` in the order of :func:`mim.patches.patchify`.

        Of networks it is the middle of an image in which all tokens are this one.
        """
        side, parts = self.stride, []
        for codes in torch.split(self.codebook.codes, _AT_ONCE):
            images = self.draw(codes[:, None, None].expand(-1, 5, 5, -1)).clamp(0, 1)
            middle = images[:, :, 2 * side : 3 * side, 2 * side : 3 * side].contiguous()
            parts.append(patchify(middle, side).flatten(1))
        return torch.cat(parts)

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
        tiles = torch.nn.functional.embedding(ids.flatten(1), self._shown())  # (B, h*w, p*p*3)
        return unpatchify(tiles, (ids.shape[1], ids.shape[2]), self.stride)

    def freeze(self) -> Self:
        """Ends fitting: in evaluation mode from now on, and what codes look like is drawn once."""
        self._drawn = {}
        return self.eval().requires_grad_(False)

    def _shown(self) -> Tensor:
        """:meth:`tiles`, of a frozen tokenizer those drawn before."""
        if self._drawn is None:
            return self.tiles()
        device = self.codebook.codes.device
        key = (device, self.codebook.codes.dtype)
        if key not in self._drawn:
            # Probes may be the first to ask, and training could not use what inference mode has made.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                self._drawn[key] = self.tiles()
        return self._drawn[key]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - torch's signature
        """As torch; what codes looked like before is forgotten."""
        super()._load_from_state_dict(*args, **kwargs)
        self._drawn = None if self._drawn is None else {}

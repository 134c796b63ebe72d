"""Patches of pixels as their own vectors: k-means, which needs no network and decodes by looking up."""

from typing import Any

from torch import Tensor

from mim.patches import patch_grid, patchify, unpatchify
from mim.tokenizers.base import Tokenizer
from mim.tokenizers.codebook import Codebook


class PatchTokenizer(Tokenizer):
    """Every patch becomes the code that is nearest in pixels.

    Args:
        codes: number of ids ``V``.
        stride: side of a patch in pixels.
    """

    kind = "patches"

    def __init__(self, codes: int = 512, stride: int = 4) -> None:
        super().__init__()
        self.stride = stride
        self.codebook = Codebook(codes, 3 * stride**2)

    def settings(self) -> dict[str, Any]:
        """See :meth:`Tokenizer.settings`."""
        return {"codes": self.codes, "stride": self.stride}

    def embed(self, images: Tensor) -> Tensor:
        """The patches; see :meth:`Tokenizer.embed`."""
        rows, columns = patch_grid(images, self.stride)
        return patchify(images, self.stride).reshape(len(images), rows, columns, -1)

    def draw(self, vectors: Tensor) -> Tensor:
        """See :meth:`Tokenizer.draw`."""
        return unpatchify(vectors.flatten(1, 2), (vectors.shape[1], vectors.shape[2]), self.stride)

    def tiles(self) -> Tensor:
        """The codes themselves."""
        return self.codebook.codes.clamp(0, 1)

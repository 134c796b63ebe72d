"""VQGAN's tokenizer (arXiv:2012.09841): public weights in the layout of its first release, read for use, not trained.

Residual blocks and attention down to a token, the nearest code in its place, and the same way back. Widths, blocks and
places of attention are read off the weights' names and shapes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from mim.errors import UserError
from mim.tokenizers.base import Tokenizer
from mim.tokenizers.codebook import Codebook

_GROUPS = 32
_CODES, _OWN_CODES = "quantize.embedding.weight", "codebook.codes"
_NOT_NEEDED = ("loss.",)  # discriminator and perceptual net of its training
_OTHERS = {
    "quantize.embed.weight": "a VQGAN with Gumbel quantisation",
    "encoder.down_blocks.0.resnets.0.conv1.weight": "diffusers' layout of a VQGAN",
}


class VQGANTokenizer(Tokenizer):
    """The autoencoder of VQGAN around its codebook.

    Args:
        codes: number of ids ``V``.
        dim: width of a code, ``E``.
        width: channels at full size; a multiple of 32.
        multiples: channels of each level over ``width``, the finest first; each level but the last halves the size.
        blocks: residual blocks on a level.
        attention: whether there is attention behind each block, by level.
        channels: between the convolutions and the map to the codes' width.
    """

    kind = "vqgan"

    def __init__(
        self,
        codes: int,
        dim: int,
        width: int,
        multiples: Sequence[int],
        blocks: int,
        attention: Sequence[bool],
        channels: int,
    ) -> None:
        super().__init__()
        self._settings = {"codes": codes, "dim": dim, "width": width, "multiples": list(multiples)}
        self._settings |= {"blocks": blocks, "attention": list(attention), "channels": channels}
        self.stride = 2 ** (len(multiples) - 1)
        widths = [width * multiple for multiple in multiples]
        self.encoder = _Encoder(width, widths, blocks, attention, channels)
        self.quant_conv = nn.Conv2d(channels, dim, 1)
        self.codebook = Codebook(codes, dim)
        self.post_quant_conv = nn.Conv2d(dim, channels, 1)
        self.decoder = _Decoder(widths, blocks + 1, attention, channels)

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], name: str) -> Self:
        """The tokenizer that ``weights`` are of, frozen and in evaluation mode.

        Args:
            weights: tensors by their names in the public file.
            name: of the option and the file, for messages.

        Raises:
            UserError: for another layout.
        """
        own = {key: value for key, value in weights.items() if not key.startswith(_NOT_NEEDED)}
        if found := next((kind for key, kind in _OTHERS.items() if key in own), None):
            raise _unknown(name, f"it is {found}")
        try:
            tokenizer = cls(**_read_off(own))
            own[_OWN_CODES] = own.pop(_CODES)
            tokenizer.load_state_dict(own)
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            text = f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:160]
            raise _unknown(name, text) from error
        return tokenizer.freeze()

    def settings(self) -> dict[str, Any]:
        """See :meth:`Tokenizer.settings`."""
        return self._settings

    def embed(self, images: Tensor) -> Tensor:
        """See :meth:`Tokenizer.embed`."""
        vectors: Tensor = self.quant_conv(self.encoder(images * 2 - 1))
        return vectors.permute(0, 2, 3, 1)

    def draw(self, vectors: Tensor) -> Tensor:
        """See :meth:`Tokenizer.draw`."""
        images: Tensor = self.decoder(self.post_quant_conv(vectors.permute(0, 3, 1, 2)))
        return images / 2 + 0.5


def _read_off(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the tokenizer, by names and shapes of its weights."""
    (codes, dim), width = weights[_CODES].shape, len(weights["encoder.conv_in.weight"])
    levels = 1 + max((int(found[1]) for found in _matches(weights, r"encoder\.down\.(\d+)\.")), default=-1)
    blocks = 1 + max((int(found[1]) for found in _matches(weights, r"encoder\.down\.0\.block\.(\d+)\.")), default=-1)
    last = [len(weights[f"encoder.down.{level}.block.{blocks - 1}.conv2.weight"]) for level in range(levels)]
    if not levels or any(size % width for size in last) or width % _GROUPS:
        raise ValueError(f"its levels have {last} channels over {width}")
    return {
        "codes": codes,
        "dim": dim,
        "width": width,
        "multiples": [size // width for size in last],
        "blocks": blocks,
        "attention": [f"encoder.down.{level}.attn.0.q.weight" in weights for level in range(levels)],
        "channels": weights["quant_conv.weight"].shape[1],
    }


def _matches(weights: Mapping[str, Tensor], pattern: str) -> list[re.Match[str]]:
    return [found for key in weights if (found := re.match(pattern, key))]


def _unknown(name: str, why: str) -> UserError:
    return UserError(
        f"{name} is no tokenizer that is read here",
        why=f"{why}; what is read is VQGAN's first layout (encoder.down, quantize.embedding, decoder.up)",
        hint="a file that tokens fit has written, or weights in that layout",
    )


class _Residual(nn.Module):
    """Two convolutions beside the identity, or beside a linear map where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, inputs, h, w)`` to ``(B, outputs, h, w)``."""
        changed: Tensor = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(maps))))))
        beside: Tensor = self.nin_shortcut(maps)
        return beside + changed


class _Attention(nn.Module):
    """One head over all places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, width, h, w)`` to the same."""
        normed = self.norm(maps)
        query, key, value = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).view_as(maps)
        changed: Tensor = self.proj_out(attended)
        return maps + changed


class _Smaller(nn.Module):
    """Half the size; the image grows by a row and a column of zeros at its far ends first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, width, h, w)`` to ``(B, width, h / 2, w / 2)``."""
        smaller: Tensor = self.conv(F.pad(maps, (0, 1, 0, 1)))
        return smaller


class _Larger(nn.Module):
    """Twice the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, width, h, w)`` to ``(B, width, 2 h, 2 w)``."""
        larger: Tensor = self.conv(F.interpolate(maps, scale_factor=2.0, mode="nearest"))
        return larger


class _Level(nn.Module):
    """Residual blocks of one size, attention behind each if there is some."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Residual(outputs if number else inputs, outputs) for number in range(blocks))
        self.attn = nn.ModuleList(_Attention(outputs) for _ in range(blocks if attention else 0))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, inputs, h, w)`` to ``(B, outputs, ...)``, of another size where the level changes it."""
        for number, block in enumerate(self.block):
            maps = block(maps)
            maps = self.attn[number](maps) if len(self.attn) else maps
        changed: Tensor = self.upsample(self.downsample(maps))
        return changed


class _Middle(nn.Module):
    """Block, attention, block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = _Residual(width, width), _Attention(width), _Residual(width, width)

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, width, h, w)`` to the same."""
        middle: Tensor = self.block_2(self.attn_1(self.block_1(maps)))
        return middle


class _Encoder(nn.Module):
    """Images to vectors, ``stride`` times smaller."""

    def __init__(
        self, width: int, widths: Sequence[int], blocks: int, attention: Sequence[bool], channels: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        sides = zip([width, *widths], widths, attention, strict=False)
        self.down = nn.ModuleList(_Level(inputs, outputs, blocks, attends) for inputs, outputs, attends in sides)
        for level, outputs in zip(self.down[:-1], widths, strict=False):
            level.downsample = _Smaller(outputs)
        self.mid, self.norm_out = _Middle(widths[-1]), _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, channels, h, w)``."""
        maps = self.conv_in(images)
        for level in self.down:
            maps = level(maps)
        vectors: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(maps))))
        return vectors


class _Decoder(nn.Module):
    """The way back. Levels are numbered as the encoder's, the finest first, and run from the coarsest."""

    def __init__(self, widths: Sequence[int], blocks: int, attention: Sequence[bool], channels: int) -> None:
        super().__init__()
        self.conv_in, self.mid = nn.Conv2d(channels, widths[-1], 3, padding=1), _Middle(widths[-1])
        sides = zip([*widths[1:], widths[-1]], widths, attention, strict=True)
        self.up = nn.ModuleList(_Level(inputs, outputs, blocks, attends) for inputs, outputs, attends in sides)
        for level, outputs in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = _Larger(outputs)
        self.norm_out, self.conv_out = _norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, vectors: Tensor) -> Tensor:
        """``(B, channels, h, w)`` to ``(B, 3, H, W)``."""
        maps = self.mid(self.conv_in(vectors))
        for level in reversed(self.up):
            maps = level(maps)
        images: Tensor = self.conv_out(F.silu(self.norm_out(maps)))
        return images


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, width, eps=1e-6)

"""Make weights of one ViT fit another: positions, patch size and channels."""

from math import isqrt
from typing import cast

from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import adapt_input_conv, is_model
from torch import Tensor

from mim.vit import ViT

_SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}


def adapt(
    tensors: dict[str, Tensor], vit: ViT, grid: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights resized to the grid, patch size and channels of ``vit``, and what was done in words.

    Args:
        tensors: timm names; what cannot be adapted is returned as it is.
        vit: the model that will take them; not changed.
        grid: ``(h, w)`` of the positions in ``tensors``; a square if not known.
    """
    tensors, notes = dict(tensors), []
    if (weight := tensors.get("patch_embed.proj.weight")) is not None:
        tensors["patch_embed.proj.weight"], done = _adapt_patches(weight, vit.patch_embed.proj.weight)
        notes += done
    if (positions := tensors.get("pos_embed")) is not None and positions.ndim == 3 and vit.pos_embed is not None:
        tensors["pos_embed"], done = _adapt_positions(positions, vit, grid)
        notes += done
    return tensors, notes


def likely_model(tensors: dict[str, Tensor]) -> str | None:
    """The timm ViT that weights with timm's names seem to be made for, or None."""
    weight = tensors.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 4:
        return None
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    name = f"vit_{_SIZES.get((weight.shape[0], depth))}_patch{weight.shape[-1]}_224"
    return name if is_model(name) else None


def _adapt_patches(weight: Tensor, target: Tensor) -> tuple[Tensor, list[str]]:
    """Kernel ``(D, C, p, p)`` with the channels and patch size of ``target``; timm adapts channels from RGB only."""
    notes: list[str] = []
    if weight.ndim != 4 or len(weight) != len(target):
        return weight, notes
    if weight.shape[1] != target.shape[1] and weight.shape[1] == 3:
        notes.append(f"patch_embed adapted 3 -> {target.shape[1]} channels")
        weight = adapt_input_conv(target.shape[1], weight)
    if weight.shape[2:] != target.shape[2:]:
        notes.append(f"patch_embed resized {_by(weight.shape[2:])} -> {_by(target.shape[2:])}")
        weight = resample_patch_embed(weight, list(target.shape[2:]))
    return weight, notes


def _adapt_positions(positions: Tensor, vit: ViT, grid: tuple[int, int] | None) -> tuple[Tensor, list[str]]:
    """Positions ``(1, P + N, D)`` on the grid of ``vit``; those of class token and registers stay."""
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    patches = positions.shape[1] - prefix
    side = isqrt(max(patches, 0))
    old, new = grid or (side, side), cast(tuple[int, int], vit.patch_embed.grid_size)
    # Without a recorded grid equal counts mean equal grids; a count that is no rectangle we know stays unmatched.
    if old == new or old[0] * old[1] != patches or (grid is None and patches == new[0] * new[1]):
        return positions, []
    resized = resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=prefix)
    return resized, [f"pos_embed resized {_by(old)} -> {_by(new)}"]


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))

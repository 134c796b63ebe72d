"""Make weights of one ViT fit another: positions, patch size and channels; and tell what cannot be made to fit."""

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any, NamedTuple, cast

from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import adapt_input_conv, is_model
from timm.models.eva import Eva
from torch import Tensor

from mim.interop.translations import join_biases
from mim.vit import ViT

_SIZES = {
    (192, 12): "tiny",
    (384, 12): "small",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
    (1536, 40): "giant",
}
_PREFIX = ("cls_token", "reg_token", "dist_token")
_ESSENTIAL = ("patch_embed.", "pos_embed", *_PREFIX, "norm_pre.", "blocks.")
"""Where a tensor that stays random, or is left out, gives another network: all but what follows the last block."""
_CLASSIFIERS = ("fc.", "head.fc.")

Grid = tuple[int, int]


class Difference(NamedTuple):
    """An essential tensor that is not the same in a file and in a model.

    Args:
        name: in timm.
        there: its shape in the file, such as ``64x13x8x8``; ``missing`` if there is none.
        here: as ``there``, in the model.
    """

    name: str
    there: str
    here: str

    def __str__(self) -> str:
        """Both shapes in a few words."""
        return f"{self.name} is {self.there} there, {self.here} here"


def adapt(tensors: dict[str, Tensor], vit: ViT, grid: Grid | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Weights resized to the grid, patch size and channels of ``vit``, and what was done in words.

    Args:
        tensors: timm names; what cannot be adapted is returned as it is.
        vit: the model that will take them; not changed.
        grid: ``(h, w)`` of the positions in ``tensors``; found out from their number if not known.
    """
    tensors, notes = dict(tensors), []
    if "blocks.0.attn.qkv.bias" in vit.state_dict():
        tensors = join_biases(tensors)
    if (weight := tensors.get("patch_embed.proj.weight")) is not None:
        tensors["patch_embed.proj.weight"], done = _adapt_patches(weight, vit.patch_embed.proj.weight)
        notes += done
    if (positions := tensors.get("pos_embed")) is not None and positions.ndim == 3 and vit.pos_embed is not None:
        adapted, done = _adapt_positions(tensors, positions, vit, grid)
        tensors |= adapted
        notes += done
    return tensors, notes


def differences(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[Difference]:
    """Essential tensors that a file and a model do not share, those at the front of the network first.

    Args:
        tensors: of the file, adapted.
        own: of the model.
    """
    if any(name.startswith("blocks.") for name in own):
        names = [name for name in {**own, **tensors} if name.startswith(_ESSENTIAL)]
        names.sort(key=lambda name: next(i for i, start in enumerate(_ESSENTIAL) if name.startswith(start)))
    else:  # of a conv net all but the classifier
        names = [name for name in {**own, **tensors} if not name.startswith(_CLASSIFIERS)]
    shapes = ((name, _shape(tensors.get(name)), _shape(own.get(name))) for name in names)
    return [Difference(*row) for row in shapes if row[1] != row[2]]


def likely_model(tensors: Mapping[str, Tensor]) -> str | None:
    """The timm ViT that weights with timm's names seem to be made for, or None."""
    weight = tensors.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 4:
        return None
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    stem = f"vit_{_SIZES.get((weight.shape[0], depth))}_patch{weight.shape[-1]}"
    dinov2 = [f"{stem}_reg4_dinov2"] * ("reg_token" in tensors) + [f"{stem}_dinov2"]
    names = [*dinov2 * ("blocks.0.ls1.gamma" in tensors), f"{stem}_224"]
    return next(filter(is_model, names), None)


def arguments_of(tensors: Mapping[str, Tensor], vit: ViT) -> dict[str, Any]:
    """What ``timm.create_model`` must be given beside a model's name so that it takes weights without loss.

    Args:
        tensors: timm names, not adapted.
        vit: the named model as it is without further arguments; a skeleton on the meta device will do.

    Returns:
        Only what differs: ``in_chans``, ``class_token`` (with pooling), ``reg_tokens``, ``no_embed_class``.
    """
    found: dict[str, Any] = {}
    weight = tensors.get("patch_embed.proj.weight")
    if weight is not None and weight.ndim == 4:
        found["in_chans"] = weight.shape[1]
    if not hasattr(vit, "patch_embed"):  # a conv net
        return {}
    own: dict[str, Any] = {"in_chans": vit.patch_embed.proj.in_channels}
    if isinstance(vit, Eva):  # whose prefix is the architecture's
        return {name: value for name, value in found.items() if value != own[name]}
    if getattr(vit, "dist_token", None) is None and "dist_token" not in tensors:
        found["class_token"], found["reg_tokens"] = "cls_token" in tensors, _length(tensors.get("reg_token"))
        own |= {"class_token": vit.has_class_token, "reg_tokens": vit.num_reg_tokens}
    arguments = {name: value for name, value in found.items() if value != own[name]}
    if arguments.get("class_token") is False and vit.global_pool == "token":
        arguments |= {"global_pool": "avg", "fc_norm": "fc_norm.weight" in tensors}  # unasked, timm renames the norm
    has_positions = "pos_embed" in tensors and tensors["pos_embed"].ndim == 3
    if has_positions and not vit.no_embed_class and not _embeds_prefix(tensors, vit.patch_embed.grid_size):
        arguments["no_embed_class"] = True
    return arguments


def _embeds_prefix(tensors: Mapping[str, Tensor], grid: Grid) -> bool:
    """Whether every prefix token of a file has a position, for a model with ``grid``; registers often have none."""
    if "reg_token" not in tensors:
        return True
    everything = _prefix_of(tensors)
    prefixes = list(dict.fromkeys((everything, everything - _length(tensors.get("reg_token")), 0)))
    found = _grid_of(tensors["pos_embed"].shape[1], prefixes, grid, None)
    return found is None or found[0] == everything


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


def _adapt_positions(
    tensors: Mapping[str, Tensor], positions: Tensor, vit: ViT, grid: Grid | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Positions ``(1, P + N, D)`` on the grid of ``vit``; what else changes with them; what was done.

    Class token and registers of ``vit`` may have no position of their own: theirs are added to them then, as timm does
    it for DINOv2 with registers.
    """
    new, everything = cast(Grid, vit.patch_embed.grid_size), _prefix_of(tensors)
    if everything != vit.num_prefix_tokens:  # so that any way to tell them apart would be a guess
        return {}, []
    if vit.no_embed_class:
        prefixes = list(dict.fromkeys((0, everything - _length(tensors.get("reg_token")), everything)))
    else:
        prefixes = [vit.num_prefix_tokens]
    found = _grid_of(positions.shape[1], prefixes, new, grid)
    if found is None:
        return {}, []
    prefix, old = found
    notes: list[str] = []
    adapted: dict[str, Tensor] = {}
    if vit.no_embed_class and prefix:
        adapted = _with_positions(tensors, positions[:, :prefix])
        positions, prefix = positions[:, prefix:], 0
        notes.append(f"positions of {' and '.join(adapted)} added to them")
    if old != new:
        positions = resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=prefix)
        notes.append(f"pos_embed resized {_by(old)} -> {_by(new)}")
    return {**adapted, "pos_embed": positions}, notes


def _grid_of(count: int, prefixes: list[int], new: Grid, known: Grid | None) -> tuple[int, Grid] | None:
    """How many of ``count`` positions belong to prefix tokens, and the grid of the others.

    The grid is the one that is known; or that of the model if it has as many patches; or a square; or of the model's
    proportions. None if it is none of these.
    """
    rules: list[Callable[[int], Grid | None]] = (
        [lambda patches: known if known[0] * known[1] == patches else None]
        if known is not None
        else [
            lambda patches: new if new[0] * new[1] == patches else None,
            lambda patches: (isqrt(patches), isqrt(patches)) if _is_square(patches) else None,
            lambda patches: _in_proportion(patches, new),
        ]
    )
    found = ((prefix, rule(count - prefix)) for rule in rules for prefix in prefixes if count > prefix)
    return next(((prefix, grid) for prefix, grid in found if grid is not None), None)


def _in_proportion(patches: int, new: Grid) -> Grid | None:
    height = isqrt(patches * new[0] // new[1])
    width = height * new[1] // new[0]
    return (height, width) if height * new[1] == width * new[0] and height * width == patches else None


def _with_positions(tensors: Mapping[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """Prefix tokens with their positions ``(1, P, D)``, in the order class token, distillation token or registers."""
    added, start = {}, 0
    for name in ("cls_token", "dist_token", "reg_token"):
        if (token := tensors.get(name)) is not None and start < positions.shape[1]:
            added[name] = token + positions[:, start : start + token.shape[1]]
            start += token.shape[1]
    return added


def _prefix_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(_length(tensors.get(name)) for name in _PREFIX)


def _length(tokens: Tensor | None) -> int:
    """How many tokens ``(1, n, D)`` are; 0 if there are none."""
    return 0 if tokens is None or tokens.ndim != 3 else tokens.shape[1]


def _is_square(count: int) -> bool:
    return count > 0 and isqrt(count) ** 2 == count


def _shape(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return _by(tensor.shape) + ("" if tensor.is_floating_point() else " whole numbers")


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))

"""Checkpoint layouts, recognised by their keys, never by a file name, and translated to timm's names.

A new layout is one function and one line in ``_LAYOUTS``.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Lightning, timm and HPM; MAE and its descendants; self-distillation, whose published numbers are the teacher's; HPM's
# moving average, where nothing else is kept. The order matters: an HPM file names its architecture under "model".
_CONTAINERS = ("state_dict", "model", "teacher", "student", "ema_state_dict")
_WRAPPERS = ("_orig_mod.", "module.")  # torch.compile; DataParallel and DDP


def named_tensors(checkpoint: object) -> dict[str, Tensor]:
    """The dense tensors of a loaded checkpoint by name, without containers, optimizer and wrapper prefixes.

    Returns:
        Tensors of any shape; empty if ``checkpoint`` is not a checkpoint.
    """
    for key in _CONTAINERS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping):
        return {}
    return {
        _without_wrappers(str(name)): value
        for name, value in checkpoint.items()
        if isinstance(value, Tensor) and value.layout == torch.strided
    }


def to_timm(tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Name of the layout and the encoder's tensors under the names that timm's ``VisionTransformer`` uses."""
    layout = next(layout for layout in _LAYOUTS if any(name.startswith(layout.marker) for name in tensors))
    return layout.name, layout.convert(tensors)


def _without_wrappers(name: str) -> str:
    name = name.replace("_orig_mod.", "")  # compiled blocks carry it in the middle
    while name.startswith(_WRAPPERS):
        name = name.removeprefix("module.")
    return name


def _run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This project's checkpoints: the ViT sits in the method's encoder."""
    prefix = "encoder.vit."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _run_of_a_teacher(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This project's checkpoints of methods whose teacher, having a head like the student's, is what is evaluated."""
    return _run({name.removeprefix("teacher.module."): t for name, t in tensors.items() if name.startswith("teacher.")})


def _ibot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published iBOT, AttMask and DINO files, whole ones (backbone and head) and those with the backbone alone."""
    whole = any(name.startswith("backbone.") for name in tensors)
    renamed = {
        name.removeprefix("backbone.").replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma"): tensor
        for name, tensor in tensors.items()
        if not whole or name.startswith("backbone.")
    }
    return {name: tensor for name, tensor in renamed.items() if name != "masked_embed"}


def _mae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published MAE files with decoder; timm's own filter takes them for DINOv2 files and keeps the decoder.

    The encoder-only and the fine-tuned files need no function: their names are timm's.
    """
    return {name: t for name, t in tensors.items() if name != "mask_token" and not name.startswith("decoder_")}


def _hpm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published HPM files: an MAE with a second decoder and, rarely, a token for visible patches that were masked."""
    return {name: tensor for name, tensor in _mae(tensors).items() if name != "vis_mask_token"}


class _Layout(NamedTuple):
    name: str
    marker: str  # the start of a name that only this layout has
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]


_LAYOUTS = (
    _Layout("mim run", "teacher.module.head.", _run_of_a_teacher),
    _Layout("mim run", "encoder.vit.", _run),
    _Layout("hpm", "decoder_blocks_losspred.", _hpm),
    _Layout("mae", "decoder_", _mae),
    _Layout("ibot", "backbone.", _ibot),
    _Layout("ibot", "masked_embed", _ibot),
    _Layout("timm", "", dict),
)

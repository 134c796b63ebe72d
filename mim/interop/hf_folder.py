"""Folders that ``transformers`` writes: what their ``config.json`` tells about a ViT."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from mim.interop.built import Built, built_of_hugging_face

MODEL_TYPES = ("vit", "vit_mae", "vit_msn", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa")
"""Kinds of models whose weights are read."""


class HFFolder(NamedTuple):
    """A ViT as a Hugging Face folder describes it.

    Args:
        img_size: ``(height, width)`` in pixels.
        grid: ``(h, w)`` patches per side.
        mean: per channel, of pixels in 0..1; None if the folder does not tell.
        std: as ``mean``.
        built: heads and activation.
    """

    img_size: tuple[int, int]
    grid: tuple[int, int]
    mean: list[float] | None
    std: list[float] | None
    built: Built = Built()


def hf_folder(folder: Path) -> HFFolder | None:
    """What a Hugging Face folder says; None if it is not one of a ViT that can be read."""
    config, pictures = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
    try:
        if config.get("model_type") not in MODEL_TYPES:
            return None
        size, patch = _pair(config["image_size"]), _pair(config["patch_size"])
        mean, std = ([float(value) for value in pictures.get(f"image_{kind}") or ()] for kind in ("mean", "std"))
        grid = size[0] // patch[0], size[1] // patch[1]
        return HFFolder(size, grid, mean or None, std or None, built_of_hugging_face(config))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _pair(side: Any) -> tuple[int, int]:  # noqa: ANN401 - whatever stands in the file
    height, width = side if isinstance(side, list) else (side, side)
    return int(height), int(width)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}

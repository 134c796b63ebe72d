"""A ViT as a graph for other runtimes: ONNX or torch.export."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.export import Dim

from mim.errors import UserError
from mim.randomness import keyed_generator
from mim.vit import ViT

_MOST = 512  # patches per side that a graph for images of any size takes
CLASSES = "classes.json"
"""Where a graph of a classifier keeps the names of its classes: metadata in ONNX, an extra file in torch.export."""


class _Whole(nn.Module):
    """Images ``(B, C, H, W)`` to logits ``(B, classes)``, or to tokens ``(B, P + N, D)`` if there is no classifier."""

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.vit(images) if self.vit.num_classes else self.vit.forward_features(images)
        return answer


@torch.no_grad()
def write_graph(vit: ViT, target: Path, to: Literal["onnx", "torch-export"], class_names: Sequence[str] = ()) -> float:
    """Write a graph for any batch size, run it, and return its largest difference from the model.

    A model that takes images of any size is written so, too, where :func:`of_any_size` says so: both sides any multiple
    of the patch size.
    """
    missing = [name for name in ("onnx", "onnxscript") if to == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {' and '.join(missing)}", hint="pip install 'mim-suite[onnx]'")
    model = _Whole(vit).cpu().eval()
    trials = [torch.rand(size, generator=keyed_generator("export")) for size in _sizes(vit, of_any_size(vit, to))]
    graph = torch.export.export(model, (trials[-1],), dynamic_shapes=(_dynamic(vit, of_any_size(vit, to)),))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".partial-{target.name}")  # with its ending, which torch.export asks for
    names = json.dumps(list(class_names)) if class_names else None
    if to == "onnx":
        run = _write_onnx(graph, partial, "logits" if vit.num_classes else "tokens", names)
    else:
        run = _write_export(graph, partial, names)
    difference = max(float((run(images) - model(images)).abs().max()) for images in trials)
    partial.replace(target)
    return difference


def of_any_size(vit: ViT, to: Literal["onnx", "torch-export"]) -> bool:
    """Whether a graph takes images of any size; torch writes fixed counts of patches into ONNX of rotary positions."""
    return bool(vit.dynamic_img_size) and not (to == "onnx" and isinstance(vit, Eva))


def _sizes(vit: ViT, any_size: bool) -> list[tuple[int, int, int, int]]:
    """Inputs that a graph is tried on: the model's own size and, if it takes any, another."""
    channels, (height, width) = vit.patch_embed.proj.in_channels, cast(tuple[int, int], vit.patch_embed.img_size)
    down, right = cast(tuple[int, int], vit.patch_embed.patch_size)
    own, other = (2, channels, height, width), (3, channels, height + down, width + 2 * right)
    return [own, other] if any_size else [own]


def _dynamic(vit: ViT, any_size: bool) -> dict[int, Any]:
    """What of the input may change, as ``torch.export`` wants to know it."""
    dimensions: dict[int, Any] = {0: Dim("batch")}
    if any_size:
        down, right = cast(tuple[int, int], vit.patch_embed.patch_size)
        dimensions |= {2: down * Dim("rows", min=1, max=_MOST), 3: right * Dim("columns", min=1, max=_MOST)}
    return dimensions


def _write_export(graph: torch.export.ExportedProgram, path: Path, names: str | None) -> Callable[[Tensor], Tensor]:
    torch.export.save(graph, path, extra_files={CLASSES: names} if names else {})
    return cast(Callable[[Tensor], Tensor], torch.export.load(path).module())


def _write_onnx(
    graph: torch.export.ExportedProgram, path: Path, output: str, names: str | None
) -> Callable[[Tensor], Tensor]:
    import onnx
    from onnx.reference import ReferenceEvaluator

    # One file: weights beside the graph would lose it when it is renamed. ONNX allows 2 GB, enough for a ViT-Huge.
    torch.onnx.export(
        graph, (), path, input_names=["images"], output_names=[output], external_data=False, verbose=False
    )
    if names:
        model = onnx.load(path)
        onnx.helper.set_model_props(model, {CLASSES: names})
        onnx.save(model, path)
    session: Any = ReferenceEvaluator(str(path))
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

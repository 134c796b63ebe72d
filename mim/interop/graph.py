"""A ViT as a graph for other runtimes: ONNX or torch.export."""

import importlib.util
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from mim.errors import UserError
from mim.randomness import keyed_generator
from mim.vit import ViT


class _Tokens(nn.Module):
    """Images ``(B, C, H, W)`` to tokens ``(B, P + N, D)``: what a graph holds, without pooling or head."""

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_features(images)


@torch.no_grad()
def write_graph(vit: ViT, target: Path, to: Literal["onnx", "torch-export"]) -> float:
    """Write a graph for any batch size, run it, and return its largest difference from the model."""
    missing = [name for name in ("onnx", "onnxscript") if to == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {' and '.join(missing)}", hint="pip install 'mim-suite[onnx]'")
    model = _Tokens(vit).cpu().eval()
    channels, (height, width) = vit.patch_embed.proj.in_channels, cast(tuple[int, int], vit.patch_embed.img_size)
    images = torch.rand(2, channels, height, width, generator=keyed_generator("export"))
    graph = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    if to == "onnx":
        tokens = _write_onnx(graph, partial, images)
    else:
        torch.export.save(graph, partial)
        tokens = torch.export.load(partial).module()(images)
    partial.replace(target)
    return float((tokens - model(images)).abs().max())


def _write_onnx(graph: torch.export.ExportedProgram, path: Path, images: Tensor) -> Tensor:
    from onnx.reference import ReferenceEvaluator

    # One file: weights beside the graph would lose it when it is renamed. ONNX allows 2 GB, enough for a ViT-Huge.
    torch.onnx.export(
        graph, (), path, input_names=["images"], output_names=["tokens"], external_data=False, verbose=False
    )
    (tokens,) = ReferenceEvaluator(str(path)).run(None, {"images": images.numpy()})
    return torch.from_numpy(tokens)

"""Every command on an exported rotary ViT, with positions that all blocks share and with learned ones per block."""

import json
from math import isfinite

import pytest
import timm
import torch

from mim.cli import main
from mim.commands import make_shapes
from mim.interop import ModelCard, export_backbone

pytestmark = pytest.mark.middle
ONE = ["--num_workers", "0", "--threads", "1"]
HEADS = ["--steps", "2", "--batch_size", "4", "--devices", "1", "--device", "cpu", "--pictures", "2", *ONE]
PROBE = ["--epochs", "2", "--warmup_epochs", "1", "--seeds", "1", *ONE]
MEASURED = {
    "knn": ["knn", "--k", "[3,5]", "--seeds", "1", *ONE],
    "linear": ["linear_probe", *PROBE],
    "attentive": ["linear_probe", "--head", "attentive", *PROBE],
    "reduced": ["knn", "--k", "[3,5]", "--seeds", "1", "--reduction", "tome:2", *ONE],
    "fine-tuned": ["finetune", "--batch_size", "12", "--device", "cpu", *PROBE],
    "segment linear": ["segment", "--head", "linear", *HEADS],
    "segment knn": ["segment", "--head", "knn", *HEADS],
    "segment upernet": ["segment", "--head", "upernet", "--taps", "4", "--finetune", "true", *HEADS],
}
WRITTEN = {
    "picture.png": [
        "visualize",
        "--data",
        "shapes",
        "--images",
        "2",
        "--reduction",
        "evit:0.5",
        "--out",
        "picture.png",
    ],
    "features/patch.npy": ["features", "--data", "photos", "--to", "npy", "--num_workers", "0"],
    "again/model.safetensors": ["export", "--out", "again"],
    "graph.onnx": ["export", "--to", "onnx", "--out", "graph.onnx"],
}


@pytest.fixture(params=["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def rotary(request, tmp_path, monkeypatch):
    """A folder of weights, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    vit = timm.create_model(request.param, img_size=32, patch_size=8, depth=4, embed_dim=32, num_heads=2, num_classes=0)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    card = ModelCard("DINOv3", "photos")
    assert export_backbone(vit, tmp_path / "weights", mean=[0.5] * 3, std=[0.25] * 3, card=card) == 0
    return tmp_path


@pytest.mark.parametrize("name", MEASURED)
def test_its_scores_stand_beside_those_of_an_untrained_one(name, rotary, photos):
    data = photos
    if name.startswith("segment"):
        data = rotary / "masks"
        make_shapes.run(data, train=10, val=5, size=32)
    command, *options = MEASURED[name]
    assert main(command, ["--weights", "weights", "--data", str(data), "--out", "result", *options]) == 0
    metrics = json.loads((rotary / "result" / "metrics.json").read_text())["metrics"]
    assert any(key.endswith("untrained") for key in metrics)
    scores = [values for values in metrics.values() if isinstance(values, list)]  # beside rates and classes
    assert all(isfinite(value) for values in scores for value in torch.tensor(values).flatten().tolist())


@pytest.mark.parametrize("file", WRITTEN)
def test_it_is_drawn_and_written(file, rotary, photos):
    if file == "graph.onnx":
        pytest.importorskip("onnxscript")
    command, *options = WRITTEN[file]
    assert main(command, ["--weights", "weights", *options]) == 0
    assert (rotary / file).stat().st_size > 0

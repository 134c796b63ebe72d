"""Whoever encodes images sees their numbers on the scale of the weights: every type and every door, against timm's."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import mim
from mim.cli import main
from mim.data.images import NoPictureError
from mim.data.pixels import EIGHT_BIT, Pixels
from mim.encoder import Encoder
from mim.interop import ModelCard
from mim.run.weights import export_backbone

SCALES = {
    "uint8 pictures": EIGHT_BIT,
    "uint8, 20 to 180": Pixels((20.0,), (180.0,), "uint8"),
    "uint16 of 12 bit": Pixels((0.0,), (3100.0,), "uint16"),
    "int16, Hounsfield": Pixels((-1000.0,), (1500.0,), "int16", clip=True),
    "float decibels": Pixels((-30.0,), (-5.0,), "float32"),
    "float backscatter": Pixels((1e-4,), (10.0,), "float32", log=True),
    "float with nodata": Pixels((0.0,), (1.5,), "float32", nodata=-9999.0),
}
CHANNELS = (1, 3, 6)


@pytest.fixture(params=[(name, channels) for name in SCALES for channels in CHANNELS], ids=lambda p: f"{p[0]}x{p[1]}")
def case(request, tmp_path, monkeypatch):
    """Weights that name a scale, their statistics on it, and two images ``(H, W, C)`` of that type as files."""
    name, channels = request.param
    monkeypatch.chdir(tmp_path)
    pixels = SCALES[name]
    mean, std = [0.4 + 0.01 * c for c in range(channels)], [0.2 + 0.01 * c for c in range(channels)]
    encoder = Encoder("test_vit", img_size=32, patch_size=8, in_chans=channels)
    card = ModelCard(method="MAE", data="scans", data_licence="cc0-1.0")
    settings = {"card": card, "model_args": {}, "pool": "mean"}
    export_backbone(encoder.vit, tmp_path / "weights", **settings, **pixels.exported(mean, std))
    (tmp_path / "scans").mkdir()
    images = []
    for number in range(2):
        low, high = pixels.low[0], pixels.high[0]
        values = np.random.default_rng(number).uniform(low, high, (32, 32, channels)).astype(pixels.type)
        if pixels.nodata is not None:
            values[:9, :5] = pixels.nodata
        np.save(tmp_path / "scans" / f"{number}.npy", values)
        images.append(values)
    return pixels, mean, std, images


def wanted(pixels, mean, std, images):
    """Mean patch token of every image, from timm's copy and the formula of ``docs/data.md``."""
    model = timm.create_model("local-dir:weights", pretrained=True).eval()
    values = torch.stack([torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1) for image in images])
    low, high = pixels.low[0], pixels.high[0]
    scaled = (values / low).log() / np.log(high / low) if pixels.log else (values - low) / (high - low)
    scaled = scaled.clamp(0, 1) if pixels.clip else scaled
    normed = (scaled - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    normed = normed if pixels.nodata is None else normed.masked_fill(values == pixels.nodata, 0)
    with torch.no_grad():
        return model.forward_features(normed)[:, model.num_prefix_tokens :].mean(dim=1)


NEAR = {"rtol": 1e-4, "atol": 1e-4}


def test_features_of_files_are_those_of_the_scale(case):
    found = mim.features("weights", "scans", pool="mean")
    assert not found.unreadable
    torch.testing.assert_close(found.vectors, wanted(*case), **NEAR)


def test_the_transform_takes_paths_tensors_and_arrays_to_the_same(case):
    loaded, images = mim.load("weights"), case[3]
    inputs = ["scans/0.npy", images[0], torch.from_numpy(images[0]).permute(2, 0, 1)]
    for image in inputs:
        tokens = loaded.encoder(loaded.transform(image)[None])
        torch.testing.assert_close(tokens[:, loaded.encoder.num_prefix :].mean(dim=1), wanted(*case)[:1], **NEAR)


@pytest.mark.parametrize("case", [("float decibels", 6), ("uint16 of 12 bit", 1)], indirect=True)
def test_features_of_the_command_are_those_of_the_scale_and_say_so(case):
    assert main("features", ["--weights", "weights", "--data", "scans", "--num_workers", "0", "--pool", "mean"]) == 0
    torch.testing.assert_close(load_file("features/class.safetensors")["class"], wanted(*case), **NEAR)
    assert json.loads(Path("features/features.json").read_text())["pixels"]["type"] == case[0].type


@pytest.mark.parametrize("case", [("float decibels", 3)], indirect=True)
@pytest.mark.parametrize("data", ["builtin", "shapes"])
@pytest.mark.parametrize("command", ["features", "knn", "linear_probe", "finetune", "segment", "visualize"])
def test_8_bit_images_of_the_package_are_refused_for_weights_of_another_scale(case, command, data, capsys):
    assert main(command, ["--weights", "weights", "--data", data]) == 2
    assert "these images are 8 bit, the model takes numbers from -30 to -5" in capsys.readouterr().err


@pytest.mark.parametrize("case", [("float decibels", 3)], indirect=True)
def test_numbers_of_another_type_are_no_picture_for_the_transform(case):
    with pytest.raises(NoPictureError, match="an item is of uint8, not of float32"):
        mim.load("weights").transform(np.zeros((32, 32, 3), np.uint8))

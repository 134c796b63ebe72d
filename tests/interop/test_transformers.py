"""Exports open in Hugging Face transformers, which passes the number of classes itself."""

import json

import pytest
import timm
import torch

from mim.interop import ModelCard, export_backbone


def exported(folder, num_classes=0, channels=3, **kwargs):
    vit = timm.create_model("test_vit", num_classes=num_classes, in_chans=channels, depth=2, **kwargs).eval()
    statistics = {"mean": [0.5] * channels, "std": [0.5] * channels}
    names = [f"class {number}" for number in range(num_classes)]
    export_backbone(vit, folder, **statistics, card=ModelCard("MAE", "photos"), class_names=names)
    return vit


@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_number_of_classes_stands_once_and_timm_still_knows_it(num_classes, tmp_path):
    vit = exported(tmp_path / "x", num_classes, img_size=32, patch_size=8)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert "num_classes" not in config["model_args"]
    assert config.get("label_names", []) == [f"class {number}" for number in range(num_classes)]
    again, images = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval(), torch.rand(2, 3, 32, 32)
    assert again.num_classes == num_classes
    assert torch.equal(again(images), vit(images))


KINDS = [
    {"img_size": 32, "patch_size": 8},
    {"img_size": (32, 64), "channels": 4, "reg_tokens": 4},
    {"img_size": 32, "class_token": False, "global_pool": "avg", "fc_norm": False, "dynamic_img_size": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_features_in_transformers_are_equal(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    vit = exported(tmp_path / "x", **kind)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "x").eval()
    images = torch.rand(2, kind.get("channels", 3), *vit.patch_embed.img_size)
    assert torch.equal(theirs(images).last_hidden_state, vit.forward_features(images))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_in_transformers_gives_its_logits_and_names(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    vit = exported(tmp_path / "x", 3, **kind)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "x").eval()
    images = torch.rand(2, kind.get("channels", 3), *vit.patch_embed.img_size)
    assert torch.equal(theirs(images).logits, vit(images))
    assert theirs.config.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}

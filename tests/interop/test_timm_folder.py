"""The export is a folder that timm alone turns back into the trained model."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.data import resolve_model_data_config

from mim.errors import UserError
from mim.interop import ModelCard, export_backbone
from mim.layers.positions import sincos_positions

CARD = ModelCard("MAE", "photos", "cc0-1.0", images=1200, epochs=5, steps=80, command="python tools/pretrain.py")
FILES = {"config.json", "model.safetensors", "README.md", "SHA256SUMS"}


def tiny(name="test_vit", img_size=32, patch_size=8, **kwargs):
    return timm.create_model(name, img_size=img_size, patch_size=patch_size, num_classes=0, **kwargs)


def export(vit, folder, channels=3, **model_args):
    return export_backbone(vit, folder, mean=[0.4] * channels, std=[0.2] * channels, card=CARD, model_args=model_args)


def reload(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        ({}, {}),
        ({}, {"reg_tokens": 4}),
        ({}, {"reg_tokens": 4, "no_embed_class": True}),
        ({}, {"class_token": False, "global_pool": "avg"}),
        ({}, {"global_pool": "map"}),
        ({"in_chans": 4}, {}),
        ({"in_chans": 1}, {}),
        ({"img_size": 96, "patch_size": 16}, {}),
        ({"img_size": (32, 64)}, {}),
        ({"patch_size": 4}, {}),
        ({"dynamic_img_size": False}, {}),
        ({}, {"depth": 2, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 2, "init_values": 0.1}),
        ({"name": "test_vit2"}, {}),
        ({"name": "test_vit3"}, {}),
    ],
)
def test_timm_rebuilds_exactly_the_exported_model(tmp_path, shape, kwargs):
    vit = tiny(**shape, **kwargs).eval()
    channels = shape.get("in_chans", 3)
    assert export(vit, tmp_path / "backbone", channels, **kwargs) == 0
    again = reload(tmp_path / "backbone")
    images = torch.rand(2, channels, *vit.patch_embed.img_size)
    assert torch.equal(again.forward_features(images), vit.forward_features(images))
    assert again.state_dict().keys() == vit.state_dict().keys()


def test_fixed_positions_are_exported(tmp_path):
    vit = tiny().eval()
    vit.pos_embed = torch.nn.Parameter(sincos_positions((4, 4), 64, 1), requires_grad=False)
    assert export(vit, tmp_path / "backbone") == 0
    assert torch.equal(reload(tmp_path / "backbone").pos_embed, vit.pos_embed)


def test_an_export_can_be_trained_on_and_exported_again(tmp_path):
    export(tiny(depth=2, reg_tokens=1, img_size=(32, 64)), tmp_path / "first", depth=2)
    again = reload(tmp_path / "first")
    assert export(again, tmp_path / "second") == 0


@pytest.mark.skipif(not hasattr(tiny(), "_model_args"), reason="this timm does not remember how a model was built")
def test_what_a_folder_asked_for_is_kept_without_saying_it_again(tmp_path):
    export(tiny(mlp_ratio=2, drop_path_rate=0.1), tmp_path / "first")
    assert export(reload(tmp_path / "first"), tmp_path / "second") == 0
    assert "drop_path_rate" not in json.loads((tmp_path / "second" / "config.json").read_text())["model_args"]


def test_a_compiled_backbone_keeps_its_names(tmp_path):
    vit = tiny()
    vit.blocks[0] = torch.compile(vit.blocks[0], backend="eager")
    assert export(vit, tmp_path / "backbone") == 0


def test_the_run_is_not_disturbed(tmp_path):
    vit = tiny().train()
    vit.blocks[1].eval()
    before, state = copy.deepcopy(vit.state_dict()), torch.get_rng_state()
    export(vit, tmp_path / "backbone")
    assert vit.training
    assert not vit.blocks[1].training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())


def test_half_precision_weights_are_exported_in_full(tmp_path):
    assert export(tiny().bfloat16(), tmp_path / "backbone") == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_config_tells_how_the_images_were_prepared(tmp_path, dynamic):
    export(tiny(img_size=(32, 64), in_chans=4, dynamic_img_size=dynamic), tmp_path / "backbone", channels=4)
    data = resolve_model_data_config(reload(tmp_path / "backbone"))
    assert tuple(data["input_size"]) == (4, 32, 64)
    assert list(data["mean"]) == [0.4] * 4
    assert list(data["std"]) == [0.2] * 4


def test_nothing_of_the_published_weights_of_the_architecture_is_claimed(tmp_path):
    export(tiny(), tmp_path / "backbone")
    text = (tmp_path / "backbone" / "config.json").read_text()
    assert "apache" not in text
    assert "in1k" not in text


def test_a_head_can_be_added(tmp_path):
    export(tiny(), tmp_path / "backbone")
    model = reload(tmp_path / "backbone", num_classes=7)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_feature_maps_are_available(tmp_path):
    export(tiny(), tmp_path / "backbone")
    maps = reload(tmp_path / "backbone", features_only=True)(torch.rand(2, 3, 32, 32))
    assert [tuple(m.shape) for m in maps] == [(2, 64, 4, 4)] * len(maps)


def test_another_image_size_is_available(tmp_path):
    export(tiny(), tmp_path / "backbone")
    model = reload(tmp_path / "backbone", img_size=64)
    assert model.forward_features(torch.rand(2, 3, 64, 64)).shape == (2, 65, 64)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "backbone"
    vit = tiny().eval()
    export(vit, folder)
    return folder, vit


def test_the_three_lines_of_the_card_work_without_this_project(exported, tmp_path):
    folder, vit = exported
    lines = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    assert len(lines.splitlines()) == 3
    check = "import torch, sys; torch.manual_seed(0); images = torch.rand(2, 3, 32, 32)\n"
    check += f"torch.save(model.forward_features(images), {str(tmp_path / 'features.pt')!r})\n"
    check += "assert not any(name.split('.')[0] in ('mim', 'lightning') for name in sys.modules)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-I", "-c", lines + check], check=True, cwd=tmp_path, env=environment)
    torch.manual_seed(0)
    features = vit.forward_features(torch.rand(2, 3, 32, 32))
    assert torch.equal(torch.load(tmp_path / "features.pt", weights_only=True), features)


def test_the_folder_holds_no_pickle(exported):
    assert {path.name for path in exported[0].iterdir()} == FILES


def test_the_card_tells_provenance(exported):
    text = (exported[0] / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "timm"
    assert front["license"] == "cc0-1.0"
    for fact in ("MAE", "photos, 1200 images", "Epochs: 5", "Steps: 80", "python tools/pretrain.py", timm.__version__):
        assert fact in text


def test_a_licence_in_other_words_is_kept_as_a_name(tmp_path):
    card = ModelCard("MAE", "photos", data_licence="ours: not to be shared")
    export_backbone(tiny(), tmp_path / "b", mean=[0.5] * 3, std=[0.5] * 3, card=card)
    front = yaml.safe_load((tmp_path / "b" / "README.md").read_text().split("---")[1])
    assert (front["license"], front["license_name"]) == ("other", "ours: not to be shared")


def test_the_checksums_are_those_of_the_files(exported):
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=exported[0], check=True)


def test_an_earlier_export_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    export(tiny(), tmp_path / "backbone")
    second = tiny()
    export(second, tmp_path / "backbone")
    assert torch.equal(reload(tmp_path / "backbone").pos_embed, second.pos_embed)
    assert [path.name for path in tmp_path.iterdir()] == ["backbone"]


def test_an_interrupted_export_is_swept_by_the_next(tmp_path):
    (tmp_path / ".backbone.partial").mkdir()
    (tmp_path / ".backbone.partial" / "junk").touch()
    export(tiny(), tmp_path / "backbone")
    assert [path.name for path in tmp_path.iterdir()] == ["backbone"]


def test_a_model_that_timm_cannot_rebuild_replaces_nothing(tmp_path):
    export(tiny(), tmp_path / "backbone")
    before = (tmp_path / "backbone" / "model.safetensors").read_bytes()
    odd = tiny()
    odd.blocks[0].mlp.act = torch.nn.ReLU()
    with pytest.raises(RuntimeError, match="differs by"):
        export(odd, tmp_path / "backbone")
    assert (tmp_path / "backbone" / "model.safetensors").read_bytes() == before


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    vit = tiny()
    vit.norm.weight.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="differs by nan"):
        export(vit, tmp_path / "backbone")
    assert not (tmp_path / "backbone").exists()


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds other files"):
        export(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_config_is_plain_json(exported):
    config = json.loads((exported[0] / "config.json").read_text())
    assert config["architecture"] == "test_vit"
    assert config["model_args"]["img_size"] == [32, 32]
    assert Path(exported[0]).name not in json.dumps(config)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2}, {"global_pool": "avg"}])
def test_a_pool_is_exported_and_the_norm_keeps_its_place(tmp_path, kwargs):
    vit, images = tiny(**kwargs).eval(), torch.rand(2, 3, 32, 32)
    assert export_backbone(vit, tmp_path / "x", mean=[0.4] * 3, std=[0.2] * 3, card=CARD, pool="mean") == 0
    again, tokens = reload(tmp_path / "x"), vit.forward_features(images)
    assert again.state_dict().keys() == vit.state_dict().keys()
    assert torch.equal(again(images), vit.fc_norm(tokens[:, vit.num_prefix_tokens :].mean(dim=1)))
    assert json.loads((tmp_path / "x" / "config.json").read_text())["model_args"]["global_pool"] == "avg"
    assert vit.global_pool == kwargs.get("global_pool", "token")


def test_an_export_that_says_nothing_of_the_norm_gives_the_same_features(tmp_path):
    vit, images = tiny().eval(), torch.rand(2, 3, 32, 32)
    export(vit, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    del config["model_args"]["fc_norm"]
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    assert torch.equal(reload(tmp_path / "x").forward_features(images), vit.forward_features(images))


def test_what_fine_tuning_leaves_beside_an_export_is_replaced_with_it(tmp_path):
    export(tiny(), tmp_path / "x")
    for name in ("head.safetensors", "reduction.yaml", "reduction.safetensors", "static-ltp-0.1.yaml"):
        (tmp_path / "x" / name).touch()
    export(tiny(), tmp_path / "x")
    assert {path.name for path in (tmp_path / "x").iterdir()} == FILES

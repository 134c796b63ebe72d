"""``tools/export.py``: from a run, a folder or a file to a timm folder or a graph."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch

from mim.commands.export import run as export
from mim.errors import UserError
from mim.interop import ModelCard, export_backbone
from mim.interop.graph import write_graph
from mim.run.checkpoint_files import AtomicCheckpointIO, checkpoint_name
from mim.run.config import instantiate, parse, save_config


@pytest.fixture
def method(tmp_path):
    """The method of a run in ``tmp_path / run``, whose model has a ratio that only its config knows."""
    settings = ["--data.path=photos", "--data.std=[0.1, 0.2, 0.3]", '--model.init_args.encoder.kwargs={"mlp_ratio": 2}']
    config = parse([f"--config={Path(__file__).parents[1] / 'tiny.yaml'}", *settings])
    method = instantiate(config).model.eval()
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run" / "config.yaml")
    (tmp_path / "run" / "command.txt").write_text("python -m mim pretrain --data photos")
    state = {"state_dict": method.state_dict(), "global_step": 24, "optimizer_states": [], "loops": {}}
    AtomicCheckpointIO().save_checkpoint(state, tmp_path / "run" / "checkpoints" / checkpoint_name(24))
    return method


@pytest.fixture
def file(tmp_path):
    """An encoder-only file."""
    torch.save({"model": timm.create_model("test_vit", num_classes=0).state_dict()}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def reload(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def features(vit):
    return vit.forward_features(torch.ones(1, 3, 32, 32))


def test_a_run_is_exported_into_its_own_folder(tmp_path, method, capsys):
    export(run=tmp_path / "run")
    again = reload(tmp_path / "run" / "export" / "backbone")
    assert torch.equal(features(again), features(method.backbone))
    assert "checked: timm gives the same features, max difference 0" in capsys.readouterr().out


def test_normalisation_and_licence_of_a_run_are_recorded(tmp_path, method):
    export(run=tmp_path / "run", out=tmp_path / "out", data_licence="cc-by-4.0")
    cfg = reload(tmp_path / "out").pretrained_cfg
    assert cfg["mean"] == [0.485, 0.456, 0.406]
    assert cfg["std"] == [0.1, 0.2, 0.3]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert "Data: photos" in card
    assert "`python -m mim pretrain --data photos`" in card


def test_an_export_can_be_exported_again(tmp_path, file):
    export(weights=str(file), model="test_vit", out=tmp_path / "first")
    export(weights=str(tmp_path / "first"), out=tmp_path / "second")
    assert torch.equal(features(reload(tmp_path / "second")), features(reload(tmp_path / "first")))


def test_a_file_is_converted_for_the_model_that_is_named(tmp_path, file, capsys):
    export(weights=str(file), model="test_vit", out=tmp_path / "out")
    assert "78 of 78 tensors" in capsys.readouterr().out


def test_a_file_without_a_model_is_refused(tmp_path, file):
    with pytest.raises(UserError, match="does not say which model"):
        export(weights=str(file), out=tmp_path / "out")


@pytest.mark.parametrize("arguments", [{}, {"run": "runs/1", "weights": "x.pth"}])
def test_exactly_one_source_is_wanted(arguments):
    with pytest.raises(UserError, match="either --run or --weights"):
        export(**arguments)


def test_weights_need_a_place():
    with pytest.raises(UserError, match="needs a place"):
        export(weights="test_vit")


def test_a_model_of_another_family_is_refused(tmp_path):
    with pytest.raises(UserError, match="is neither a plain nor a rotary ViT"):
        export(weights="mobilenetv3_small_050", out=tmp_path / "out")


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file, folder or timm weights"):
        export(weights="vit_nonsense", out=tmp_path / "out")


def test_channels_and_registers_of_a_file_are_exported(tmp_path):
    vit = timm.create_model("test_vit", num_classes=0, in_chans=5, reg_tokens=4).eval()
    torch.save({"model": vit.state_dict()}, tmp_path / "x.pth")
    export(weights=str(tmp_path / "x.pth"), model="test_vit", out=tmp_path / "out")
    images = torch.rand(1, 5, 160, 160)
    assert torch.equal(reload(tmp_path / "out").forward_features(images), vit.forward_features(images))


def test_a_classifier_is_exported_with_its_head_and_the_names_of_its_classes(tmp_path):
    vit = timm.create_model("test_vit", num_classes=2, img_size=32, patch_size=8).eval()
    statistics = {"mean": [0.5] * 3, "std": [0.5] * 3}
    export_backbone(vit, tmp_path / "a", **statistics, card=ModelCard("x", "x"), class_names=["cat", "dog"])
    export(weights=str(tmp_path / "a"), out=tmp_path / "b")
    again, images = reload(tmp_path / "b"), torch.rand(2, 3, 32, 32)
    assert torch.equal(again(images), vit(images))
    assert again.pretrained_cfg["label_names"] == ["cat", "dog"]


def test_only_a_timm_folder_is_pushed(tmp_path):
    with pytest.raises(UserError, match="--push uploads a timm folder"):
        export(weights="test_vit", out=tmp_path / "x.onnx", to="onnx", push="someone/model")


def test_a_hub_that_does_not_take_it_is_told_in_three_lines(tmp_path, method, monkeypatch):
    def refuse(*_):
        raise ConnectionError("401 Unauthorized")

    monkeypatch.setattr("mim.hub.upload", refuse)
    with pytest.raises(UserError, match="--push someone/model: the Hugging Face Hub did not take it") as refused:
        export(run=tmp_path / "run", push="someone/model")
    assert refused.value.why == "401 Unauthorized"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_a_graph_of_a_classifier_gives_logits_and_names_for_images_of_any_size(tmp_path, to):
    vit = timm.create_model("test_vit", num_classes=2, img_size=32, patch_size=8, dynamic_img_size=True).eval()
    vit.requires_grad_(False)
    path = tmp_path / ("x.onnx" if to == "onnx" else "x.pt2")
    assert write_graph(vit, path, to, ["cat", "dog"]) < 1e-4  # tries another size, too
    images = torch.rand(1, 3, 16, 48)
    if to == "onnx":
        onnx, reference = pytest.importorskip("onnx"), pytest.importorskip("onnx.reference")
        (answer,) = reference.ReferenceEvaluator(str(path)).run(["logits"], {"images": images.numpy()})
        names = {each.key: each.value for each in onnx.load(path).metadata_props}["classes.json"]
    else:
        kept = {"classes.json": ""}
        answer = torch.export.load(path, extra_files=kept).module()(images).numpy()
        names = kept["classes.json"]
    torch.testing.assert_close(torch.from_numpy(answer), vit(images), atol=1e-4, rtol=1e-4)
    assert json.loads(names) == ["cat", "dog"]


@pytest.mark.slow
def test_torch_export_gives_the_tokens_for_any_batch_size(tmp_path, method):
    export(run=tmp_path / "run", to="torch-export")
    graph = torch.export.load(tmp_path / "run" / "export" / "backbone.pt2").module()
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(graph(images), method.backbone.forward_features(images))


@pytest.mark.slow
def test_onnx_gives_the_tokens_for_any_batch_size(tmp_path, method, capsys):
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    export(run=tmp_path / "run", to="onnx")
    assert float(re.search(r"max difference (\S+)\)", capsys.readouterr().out)[1]) < 1e-4
    session = reference.ReferenceEvaluator(str(tmp_path / "run" / "export" / "backbone.onnx"))
    images = torch.rand(3, 3, 32, 32)
    (tokens,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(tokens), method.backbone.forward_features(images), atol=1e-4, rtol=1e-4)


def test_missing_onnx_packages_are_named(tmp_path, method, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs onnx and onnxscript"):
        export(run=tmp_path / "run", to="onnx")

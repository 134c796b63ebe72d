"""Weights of the same shapes whose model computed otherwise: heads and activation come from what lies beside them."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_foreign_layouts import hf_folder, hugging_face, prefixed, vit

from mim.errors import UserError
from mim.interop import ModelCard, built, export_backbone
from mim.run.weights import init_backbone, load_encoder

OTHERWISE = {"num_heads": 8, "act_layer": "quick_gelu"}
HF_NAMES = {"num_heads": "num_attention_heads", "act_layer": "hidden_act"}


def timm_home(folder, **arguments):
    export_backbone(vit(**arguments), folder, mean=[0.5] * 3, std=[0.5] * 3, card=ModelCard("x", "y"))
    return folder


def hf_home(folder, **arguments):
    folder.mkdir()
    hf_folder(folder, hugging_face(vit(**arguments).state_dict()), "vit", (32, 32))
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_attention_heads": 2, "hidden_act": "gelu"}
    (folder / "config.json").write_text(
        json.dumps(config | {HF_NAMES[name]: value for name, value in arguments.items()})
    )
    return folder


HOMES = {"timm": timm_home, "hugging face": hf_home}


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("what", OTHERWISE)
def test_another_number_of_heads_or_activation_is_refused_with_the_argument_that_mends_it(home, what, tmp_path):
    arguments = {what: OTHERWISE[what]}
    folder = HOMES[home](tmp_path / "x", **arguments)
    for weights in (folder, folder / "model.safetensors"):
        with pytest.raises(UserError, match="is of a model that computes otherwise") as refused:
            init_backbone(vit(), str(weights))
        assert refused.value.hint == f"--model.init_args.encoder.kwargs '{json.dumps(arguments)}'"
    init_backbone(vit(**arguments), str(folder))


@pytest.mark.parametrize("home", HOMES)
def test_the_same_heads_and_activation_pass(home, tmp_path):
    init_backbone(vit(), str(HOMES[home](tmp_path / "x")))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"num_heads": 6}, {"num_attention_heads": 6}), ({"act_layer": "gelu_tanh"}, {"hidden_act": "gelu_new"})],
)
def test_an_evaluation_builds_what_a_hugging_face_folder_says(arguments, named, tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments).eval()
    save_file(hugging_face(source.state_dict()), tmp_path / "model.safetensors")
    config = {"model_type": "vit", "image_size": 224, "patch_size": 16, "num_attention_heads": 3} | named
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = torch.rand(1, 3, 224, 224)
    assert torch.equal(load_encoder(str(tmp_path)).encoder(images), source.forward_features(images))


def test_a_model_that_is_named_against_what_a_folder_says_is_refused(tmp_path):
    folder = timm_home(tmp_path / "x", num_heads=8)
    with pytest.raises(UserError, match="computes otherwise") as refused:
        load_encoder(str(folder), model="test_vit", img_size=32)
    assert refused.value.hint == "leave --model out"
    assert built(load_encoder(str(folder)).encoder.vit).num_heads == 8


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"])
def test_activations_are_told_apart_by_what_they_compute(name):
    assert built(vit(act_layer=name)).act_layer == name
    with torch.device("meta"):
        assert built(timm.create_model("test_vit", act_layer=name)).act_layer == name


def adapters(state):
    return state | {f"blocks.0.attn.qkv.lora_{letter}.default.weight": torch.ones(4, 4) for letter in "AB"}


ADAPTED = {
    "beside the weights": lambda state: {"model": adapters(state)},
    "around the weights": lambda state: prefixed(
        "base_model.model.", {name.replace("qkv.", "qkv.base_layer."): part for name, part in adapters(state).items()}
    ),
    "alone": lambda state: {name: part for name, part in adapters(state).items() if "lora" in name},
    "of loralib": lambda state: state | {"blocks.1.mlp.fc1.lora_A": torch.ones(4, 64)},
}


@pytest.mark.parametrize("layout", ADAPTED)
def test_adapters_that_are_not_merged_are_refused_by_name(layout, tmp_path):
    torch.save(ADAPTED[layout](vit().state_dict()), tmp_path / "x.pth")
    with pytest.raises(UserError, match="holds LoRA adapters that are not merged into the weights") as refused:
        init_backbone(vit(), str(tmp_path / "x.pth"))
    assert "lora_A" in refused.value.why


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_another_precision_land_as_they_are(dtype, tmp_path):
    source, target = vit(), vit()
    torch.save({name: part.to(dtype) for name, part in source.state_dict().items()}, tmp_path / "x.pth")
    init_backbone(target, str(tmp_path / "x.pth"))
    assert torch.equal(target.norm.weight, source.norm.weight.to(dtype).float())
    assert target.norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.bin", lambda state, path: save_file(state, path, metadata={"format": "pt"})),
        ("x", lambda state, path: save_file(state, path)),
        ("x.safetensors", lambda state, path: torch.save(state, path)),
        ("x.pth.tar", lambda state, path: torch.save({"state_dict": state}, path)),
    ],
)
def test_a_file_is_read_by_what_is_in_it_not_by_its_name(name, write, tmp_path):
    source, target = vit(), vit()
    write(source.state_dict(), tmp_path / name)
    init_backbone(target, str(tmp_path / name))
    assert torch.equal(target.norm.weight, source.norm.weight)


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".msgpack", ".onnx", ".gguf", ".tflite"])
def test_weights_of_other_programs_are_named(suffix, tmp_path):
    (tmp_path / f"x{suffix}").write_bytes(b"PK\x03\x04 or anything else")
    with pytest.raises(UserError, match="which are not read") as refused:
        init_backbone(vit(), str(tmp_path / f"x{suffix}"))
    assert refused.value.hint.startswith("torch.save(model.state_dict(), 'x.pth')")


def test_a_folder_with_weights_of_another_program_says_which(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 32, "patch_size": 8}))
    (tmp_path / "flax_model.msgpack").write_bytes(b"x")
    with pytest.raises(UserError, match="holds no weights") as refused:
        init_backbone(vit(), str(tmp_path))
    assert refused.value.why.startswith("it has flax_model.msgpack")


def test_a_hugging_face_model_of_another_kind_is_named(tmp_path):
    hf_folder(tmp_path, hugging_face(vit().state_dict()), "swin", (32, 32))
    with pytest.raises(UserError, match="is not that of a model") as refused:
        load_encoder(str(tmp_path))
    assert refused.value.why.startswith("a swin of Hugging Face is not read; vit, vit_mae")

"""Files and folders of other programs, each built with random weights: every tensor of the encoder lands exactly."""

import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from mim.errors import UserError
from mim.run.weights import init_backbone, load_encoder

HF_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
HF_DINOV2 = {"attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1"}
HF_DINOV2 |= {"ls2.gamma": "layer_scale2.lambda1"}
HF_FRONT = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
HF_NOW = {"attn.proj": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after"}
MMPRETRAIN = {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
MMPRETRAIN |= {"ls1.gamma": "attn.gamma1.weight", "ls2.gamma": "ffn.gamma2.weight"}


def vit(**kwargs):
    """A model of two blocks in which no two tensors are alike."""
    kwargs = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 0, **kwargs}
    model = timm.create_model(kwargs.pop("model", "test_vit"), **kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def renamed(state, front, block, blocks):
    """Timm's names in other words: a table for what stands once, one for the inside of a block, the blocks' stem."""

    def rename(name):
        table, stem, rest = front, "", name
        if match := re.match(r"blocks\.(\d+)\.(.*)", name):
            table, stem, rest = block, f"{blocks}.{match[1]}.", match[2]
        for old, new in table.items():
            if rest == old or rest.startswith(f"{old}."):
                return f"{stem}{new}{rest.removeprefix(old)}"
        return f"{stem}{rest}"

    return {rename(name): tensor for name, tensor in state.items()}


def hugging_face(state, block=HF_BLOCK, blocks="encoder.layer", thirds="attention.attention.{}"):
    names = [thirds.format(third) for third in ("query", "key", "value")]
    found = {}
    for name, tensor in renamed(state, HF_FRONT, block, blocks).items():
        if ".attn.qkv." not in name:
            found[name] = tensor
            continue
        for third, part in zip(names, tensor.chunk(3), strict=True):
            found[name.replace("attn.qkv", third)] = part.clone()
    return found


def mmpretrain(state):
    return renamed(state, {"patch_embed.proj": "patch_embed.projection", "norm": "ln1"}, MMPRETRAIN, "layers")


def split_bias(state):
    """BEiT's way: no bias for keys."""
    found = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias"):
            stem = name.removesuffix("qkv.bias")
            found[f"{stem}q_bias"], _, found[f"{stem}v_bias"] = tensor.chunk(3)
        else:
            found[name] = tensor
    return found


def chunked(state):
    """DINOv2's sharded training: blocks are numbered through, their chunks stand before them."""
    return {re.sub(r"^blocks\.(\d)\.", r"blocks.\1.\1.", name): tensor for name, tensor in state.items()}


def other(state):
    return {name: tensor + 1 for name, tensor in state.items()}


def heads(prefix):
    return {f"{prefix}{name}.weight": torch.ones(2, 2) for name in ("mlp.0", "last_layer")}


DECODER = {"decoder.blocks.0.attn.qkv.weight": torch.ones(3, 3), "decoder.mask_token": torch.ones(1)}
PREDICTOR = {"module.predictor_blocks.0.attn.qkv.weight": torch.ones(3, 3), "module.mask_token": torch.ones(1)}
LAYOUTS = {
    "mmpretrain MAE": lambda s: {
        "meta": {"epoch": 3},
        "state_dict": prefixed("backbone.", mmpretrain(s))
        | {"backbone.mask_token": torch.ones(1), "neck.decoder_blocks.0.attn.qkv.weight": torch.ones(2)},
    },
    "backbone.vit": lambda s: {"state_dict": prefixed("backbone.vit.", s) | {"head.weight": torch.ones(2)}},
    "any prefix": lambda s: {"network": {"weights": prefixed("module.net.trunk.", s)}},
    "lightly-train DINO": lambda s: {
        "state_dict": prefixed("student_embedding_model.wrapped_model._model.", other(s))
        | prefixed("teacher_embedding_model.wrapped_model._model.", s)
    },
    "DINOv2 teacher": lambda s: {
        "teacher": prefixed("backbone.", s | {"mask_token": torch.ones(1, 64)}) | heads("dino_head.")
    },
    "DINOv2 training": lambda s: {
        "model": prefixed("student.backbone.", other(s))
        | prefixed("teacher.backbone.", s)
        | heads("teacher.dino_head."),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
    },
    "DINOv2 chunks": lambda s: {"teacher": prefixed("backbone.", chunked(s))},
    "MoCo v3": lambda s: {
        "arch": "vit_small",
        "state_dict": prefixed("module.momentum_encoder.", other(s)) | prefixed("module.base_encoder.", s),
    },
    "I-JEPA": lambda s: {
        "encoder": prefixed("module.", other(s)),
        "predictor": PREDICTOR,
        "target_encoder": prefixed("module.", s),
    },
    "DeepSpeed": lambda s: {"module": prefixed("model.", s), "ds_version": "0.16"},
    "FSDP": lambda s: {"model": prefixed("_fsdp_wrapped_module.", s)},
    "open_clip trunk": lambda s: {"state_dict": prefixed("module.visual.trunk.", s) | {"logit_scale": torch.ones(1)}},
    "Hugging Face ViT": lambda s: hugging_face(s) | {"pooler.dense.weight": torch.ones(2, 2)},
    "Hugging Face classifier": lambda s: prefixed("vit.", hugging_face(s)) | {"classifier.weight": torch.ones(2, 2)},
    "Hugging Face ViTMAE": lambda s: (
        prefixed("vit.", hugging_face(s))
        | {"decoder.decoder_encoder.layer.0.attention.attention.query.weight": torch.ones(2, 2)}
    ),
}


def version_5(state):
    """Names of the modules themselves, as ``torch.save(model.state_dict())`` of transformers 5 writes them."""
    found = hugging_face(state, HF_NOW, "layers", "attention.{}")
    return {re.sub(r"\.(query|key|value)\.", lambda m: f".{m[1][0]}_proj.", name): t for name, t in found.items()}


LAYOUTS["Hugging Face ViT, state of version 5"] = version_5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_the_encoder_lands(layout, tmp_path):
    source, target = vit(), vit()
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "x.pth")
    report = init_backbone(target, str(tmp_path / "x.pth"))
    assert report.startswith("init: 30 of 30 tensors")
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())


WITH_MORE = {
    "dinov2": ({"init_values": 0.1}, HF_DINOV2),
    "dinov2_with_registers": ({"init_values": 0.1, "reg_tokens": 4, "no_embed_class": True}, HF_DINOV2),
    "ijepa": ({"class_token": False, "global_pool": "avg", "fc_norm": False}, HF_BLOCK),
    "deit": ({"model": "deit_tiny_distilled_patch16_224", "embed_dim": 64, "num_heads": 2}, HF_BLOCK),
    "vit_mae": ({"img_size": (16, 64)}, HF_BLOCK),
}


@pytest.mark.parametrize("kind", WITH_MORE)
def test_a_hugging_face_folder_fits_the_model_of_its_kind(kind, tmp_path):
    kwargs, block = WITH_MORE[kind]
    source, target = vit(**kwargs), vit(**kwargs)
    tensors = hugging_face(source.state_dict(), block)
    if kind == "dinov2_with_registers":  # whose published positions begin with that of the class token
        own = torch.randn(1, 1, 64)
        tensors["embeddings.cls_token"] = tensors["embeddings.cls_token"] - own
        tensors["embeddings.position_embeddings"] = torch.cat([own, tensors["embeddings.position_embeddings"]], dim=1)
    hf_folder(tmp_path, tensors, kind, source.patch_embed.img_size)
    init_backbone(target, str(tmp_path))
    for name, tensor in target.state_dict().items():
        torch.testing.assert_close(tensor, source.state_dict()[name], rtol=0, atol=1e-6 if name == "cls_token" else 0)


def hf_folder(folder, tensors, kind, size):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {"model_type": kind, "image_size": list(size), "patch_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))


def test_an_evaluation_takes_size_and_normalisation_from_a_hugging_face_folder(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(32, 64)).eval()
    hf_folder(tmp_path, hugging_face(source.state_dict()), "vit", (32, 64))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": [32, 64], "patch_size": 16}))
    loaded = load_encoder(str(tmp_path))
    images = torch.rand(1, 3, 32, 64)
    assert torch.equal(loaded.encoder(images), source.forward_features(images))
    assert (loaded.mean, loaded.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_split_query_biases_are_joined(tmp_path):
    source, target = vit(), vit()
    for block in source.blocks:
        block.attn.qkv.bias.data[64:128] = 0  # keys have none there
    torch.save({"model": split_bias(source.state_dict())}, tmp_path / "x.pth")
    init_backbone(target, str(tmp_path / "x.pth"))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())


def test_mae_pytorch_files_get_the_positions_that_they_lack(tmp_path):
    kwargs = {"class_token": False, "global_pool": "avg", "fc_norm": False, "img_size": 224, "patch_size": 56}
    source, target = vit(**kwargs), vit(**kwargs)
    state = {name: tensor for name, tensor in split_bias(source.state_dict()).items() if name != "pos_embed"}
    whole = prefixed("encoder.", state) | DECODER | {"encoder_to_decoder.weight": torch.ones(2, 2)}
    torch.save({"model": whole}, tmp_path / "x.pth")
    assert "(mae-pytorch layout)" in init_backbone(target, str(tmp_path / "x.pth"))
    assert torch.equal(target.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)
    for place, channel in ((0, 0), (3, 0), (3, 1), (15, 62), (15, 63)):
        angle = torch.tensor(place / 10000 ** (channel // 2 * 2 / 64), dtype=torch.float64)
        expected = (angle.sin() if channel % 2 == 0 else angle.cos()).float()
        torch.testing.assert_close(target.pos_embed[0, place, channel], expected)


@pytest.mark.parametrize(
    "state",
    [
        {f"layer{n}.0.conv1.weight": torch.ones(2, 2) for n in range(4)},
        {"decoder_blocks.0.attn.qkv.weight": torch.ones(2)},
    ],
)
def test_a_file_without_a_vit_shows_a_few_of_its_names_and_what_was_looked_for(state, tmp_path):
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(UserError) as refused:
        init_backbone(vit(), str(tmp_path / "x.pth"))
    assert refused.value.error == f"--init {tmp_path / 'x.pth'}: no Vision Transformer was found in it"
    assert "blocks.N.attn.qkv.weight (timm)" in refused.value.why
    assert next(iter(state)) in refused.value.why


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT", "ViTMAE", "Dinov2", "Dinov2WithRegisters", "IJepa", "DeiT"])
def test_features_are_those_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    small |= {"layer_norm_eps": 1e-6, "mask_ratio": 0.0} | ({} if "Dino" in name else {"intermediate_size": 128})
    small |= {"mlp_ratio": 2} if "Dino" in name else {}
    theirs = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**small)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    kwargs = {**WITH_MORE.get(theirs.config.model_type, ({},))[0], "num_heads": 4, "mlp_ratio": 2}
    kwargs.pop("img_size", None)
    ours = vit(**kwargs)
    init_backbone(ours, str(tmp_path))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(images, **({"noise": torch.arange(16.0).expand(2, -1)} if name == "ViTMAE" else {}))
        torch.testing.assert_close(ours.forward_features(images), expected.last_hidden_state, rtol=1e-4, atol=1e-4)

"""Weights of rotary ViTs: each layout is built here from a timm model and must give that model's features back."""

import pytest
import timm
import torch
from torch import nn

from mim.errors import UserError
from mim.interop import export_backbone, likely_rotary
from mim.interop.timm_folder import ModelCard
from mim.run.weights import init_backbone

SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 0, "depth": 2, "embed_dim": 32, "num_heads": 2}
PLAIN, BIASED, GATED = "vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"


def build(name, **changes):
    vit = timm.create_model(name, **SMALL | changes).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vit


def original_dinov3(vit):
    """As Meta's code saves it: one bias for queries, keys and values, of which that of the keys is masked."""
    renamed = {}
    for name, tensor in vit.state_dict().items():
        if name.endswith("q_bias"):
            value = vit.state_dict()[name.replace("q_bias", "v_bias")]
            renamed[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.ones_like(tensor), value])
        elif not name.endswith("v_bias"):
            for new, old in {"storage_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}.items():
                name = name.replace(old, new)
            for new, old in {"mlp.w1.": "mlp.fc1_g.", "mlp.w2.": "mlp.fc1_x."}.items():
                name = name.replace(old, new)
            name = name.replace("mlp.fc2.", "mlp.w3.") if "blocks.0.mlp.fc1_g.weight" in vit.state_dict() else name
            renamed[name] = tensor
    return renamed | {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(4)}


def hugging_face_dinov3(vit, prefix="layer."):
    """As ``transformers`` saves it: queries, keys and values apart."""
    state, renamed = vit.state_dict(), {"embeddings.mask_token": torch.zeros(1, 1, 32)}
    table = {"cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens"}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.weight"):
            for part, weight in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.{part}_proj").replace("blocks.", prefix)] = weight
            continue
        for old, new in {
            "patch_embed.proj.": "embeddings.patch_embeddings.",
            "attn.q_bias": "attention.q_proj.bias",
            "attn.v_bias": "attention.v_proj.bias",
            "attn.proj.": "attention.o_proj.",
            "gamma_1": "layer_scale1.lambda1",
            "gamma_2": "layer_scale2.lambda1",
            "fc1_g.": "gate_proj.",
            "fc1_x.": "up_proj.",
            "fc1.": "up_proj.",
            "fc2.": "down_proj.",
            "blocks.": prefix,
        }.items():
            name = name.replace(old, new)
        renamed[table.get(name, name)] = tensor
    return renamed


def original_pe(vit):
    """As Meta's Perception Encoder saves its visual tower."""
    renamed = {"logit_scale": torch.zeros(())}
    for name, tensor in vit.state_dict().items():
        if name.startswith("attn_pool."):
            continue
        for old, new in {
            "blocks.": "transformer.resblocks.",
            "patch_embed.proj": "conv1",
            "norm_pre": "ln_pre",
            "attn.qkv.": "attn.in_proj_",
            "attn.proj": "attn.out_proj",
            "norm1": "ln_1",
            "norm2": "ln_2",
            "norm.": "ln_post.",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        }.items():
            name = name.replace(old, new)
        special = {"cls_token": ("class_embedding", tensor.squeeze()), "pos_embed": ("positional_embedding", tensor)}
        name, tensor = special.get(name, (name, tensor))
        renamed[f"visual.{name}"] = tensor.squeeze(0) if name == "positional_embedding" else tensor
    return renamed


def original_eva02(vit):
    """As BAAI saves it: the frequencies of every block beside it."""
    return {name.replace("mlp.norm", "mlp.ffn_ln"): tensor for name, tensor in vit.state_dict().items()} | {
        "blocks.0.attn.rope.freqs_cos": torch.zeros(16, 16),
        "rope.freqs_sin": torch.zeros(16, 16),
    }


FILES = {
    "DINOv3": (PLAIN, original_dinov3),
    "DINOv3 with biases": (BIASED, original_dinov3),
    "DINOv3 with gates": (GATED, original_dinov3),
    "Hugging Face": (PLAIN, hugging_face_dinov3),
    "Hugging Face with biases": (BIASED, hugging_face_dinov3),
    "Hugging Face with gates": (GATED, lambda vit: hugging_face_dinov3(vit, "model.layer.")),
    "EVA-02": ("eva02_tiny_patch14_224", original_eva02),
    "PE": ("vit_pe_spatial_tiny_patch16_512", original_pe),
    "timm": ("vit_small_patch16_rope_mixed_ape_224", lambda vit: vit.state_dict()),
    "timm, layer scales of plain ViTs": (
        PLAIN,
        lambda vit: {
            name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): value
            for name, value in vit.state_dict().items()
        },
    ),
    "container": (PLAIN, lambda vit: {"teacher": {f"backbone.{n}": t for n, t in original_dinov3(vit).items()}}),
}


@pytest.mark.parametrize("kind", FILES)
def test_each_layout_gives_the_features_of_the_model_it_was_made_of(kind, tmp_path, capsys):
    name, save = FILES[kind]
    source, vit = build(name), build(name)
    torch.save(save(source), tmp_path / "x.pth")
    note = init_backbone(vit, str(tmp_path / "x.pth"))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vit.forward_features(images), source.forward_features(images)), note
    assert capsys.readouterr().out == ""


def test_a_rotary_export_and_a_run_are_read(tmp_path):
    source, vit = build(PLAIN), build(PLAIN)
    export_backbone(source, tmp_path / "x", mean=[0.5] * 3, std=[0.5] * 3, card=ModelCard("MAE", "photos"))
    init_backbone(vit, str(tmp_path / "x"))
    assert torch.equal(vit.blocks[1].gamma_1, source.blocks[1].gamma_1)
    other = build(PLAIN)
    torch.save({"state_dict": {f"encoder.vit.{n}": t for n, t in source.state_dict().items()}}, tmp_path / "x.ckpt")
    init_backbone(other, str(tmp_path / "x.ckpt"))
    assert torch.equal(other.blocks[1].gamma_1, source.blocks[1].gamma_1)


def test_learned_positions_of_another_grid_are_resized(tmp_path):
    source, vit = build("eva02_tiny_patch14_224"), build("eva02_tiny_patch14_224", img_size=64)
    export_backbone(source, tmp_path / "x", mean=[0.5] * 3, std=[0.5] * 3, card=ModelCard("MAE", "photos"))
    assert init_backbone(vit, str(tmp_path / "x")).endswith("pos_embed resized 4x4 -> 8x8")


def test_biases_of_zero_fit_a_model_without_them_and_others_are_refused(tmp_path):
    source = build(BIASED)
    torch.save(original_dinov3(source), tmp_path / "x.pth")
    with pytest.raises(UserError, match="its attention has biases") as error:
        init_backbone(build(PLAIN), str(tmp_path / "x.pth"))
    assert str(error.value).splitlines()[2] == "try:   --model vit_small_patch16_dinov3_qkvb"
    for block in source.blocks:
        nn.init.zeros_(block.attn.q_bias)
        nn.init.zeros_(block.attn.v_bias)
    torch.save(original_dinov3(source), tmp_path / "x.pth")
    vit, images = build(PLAIN), torch.randn(2, 3, 32, 32)
    init_backbone(vit, str(tmp_path / "x.pth"))
    torch.testing.assert_close(vit.forward_features(images), source.forward_features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb"])
@pytest.mark.parametrize("save", [original_dinov3, hugging_face_dinov3])
def test_a_dinov3_file_is_recognised_by_its_shapes(name, save):
    vit = build(name, patch_size=16, embed_dim=384, num_heads=6)
    assert likely_rotary(save(vit)) == name


def test_other_files_are_not_taken_for_dinov3():
    assert likely_rotary(timm.create_model("vit_tiny_patch16_224").state_dict()) is None


@pytest.mark.parametrize("gated", [False, True])
def test_hugging_faces_own_model_gives_the_same_features(gated, tmp_path):
    transformers = pytest.importorskip("transformers")
    vit = build(GATED if gated else BIASED)
    width = len(vit.blocks[0].mlp.fc1_g.bias if gated else vit.blocks[0].mlp.fc1.bias)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_register_tokens": 4}
    shape |= {"intermediate_size": width, "patch_size": 8, "image_size": 32, "use_gated_mlp": gated}
    theirs = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**shape, hidden_act="silu" if gated else "gelu"))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs.eval().save_pretrained(tmp_path)
    init_backbone(vit, str(tmp_path / "model.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
    torch.testing.assert_close(vit.forward_features(images), expected, rtol=1e-3, atol=1e-4)

"""Every layout is built from a tiny ViT and must give back that ViT's tensors."""

import pytest
import timm
import torch

from mim.interop import named_tensors, to_timm


@pytest.fixture
def vit():
    return timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0)


def mae_decoder():
    """What a published MAE file holds beyond the encoder."""
    names = ("decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight", "decoder_pred.bias", "decoder_pos_embed")
    return {name: torch.zeros(2) for name in ("mask_token", *names)}


def hpm_decoders():
    """What a published HPM file holds beyond the encoder."""
    second = ("blocks_losspred.0.attn.qkv.weight", "norm_losspred.weight", "pred_losspred.bias")
    return mae_decoder() | {f"decoder_{name}": torch.zeros(2) for name in second} | {"vis_mask_token": torch.ones(2)}


def hpm_file(state, average):
    """As its training script writes it: "model" is a string, and only the student's names have a prefix."""
    student = {f"module.{name}": tensor for name, tensor in (state | hpm_decoders()).items()}
    return {
        "epoch": 800,
        "state_dict": student,
        "ema_state_dict": average | hpm_decoders(),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]},
        "loss_scaler": {"scale": 65536.0},
        "model": "mae_vit_base_patch16_dec512d8b",
    }


def self_distillation(prefix):
    """What a published file of iBOT or AttMask holds beyond the backbone; its heads keep both names of one tensor."""
    head = {f"head.mlp.{i}.{kind}": torch.zeros(2) for i in (0, 2, 4) for kind in ("weight", "bias")}
    head |= {f"head.last_layer{n}.weight_{part}": torch.zeros(2) for n in ("", "2") for part in "gv"}
    return {
        f"{prefix}{name}": tensor for name, tensor in (head | {"backbone.masked_embed": torch.zeros(1, 64)}).items()
    }


def in_layout(layout, state):
    """A checkpoint as the programs write it."""
    return {
        "flat": state,
        "timm": {"state_dict": state, "epoch": 3, "arch": "test_vit"},
        "mae encoder": {"model": state},
        "mae full": {"model": {**state, **mae_decoder()}},
        "hpm": hpm_file(state, average={name: t + 1 for name, t in state.items()}),
        "hpm average": {"ema_state_dict": state | hpm_decoders(), "model": "mae_vit_base_patch16_dec512d8b"},
        "run with teacher": {
            "state_dict": {f"encoder.vit.{name}": t for name, t in state.items()}
            | {f"teacher.module.encoder.vit.{name}": t + 1 for name, t in state.items()}
        },
        "run": {
            "state_dict": {f"encoder.vit.{name}": t for name, t in state.items()}
            | {"decoder.fill.token": torch.ones(1)},
            "optimizer_states": [{"state": {0: torch.ones(3)}}],
        },
        "teacher run": {
            "state_dict": {f"teacher.module.encoder.vit.{name}": t for name, t in state.items()}
            | {f"encoder.vit.{name}": t + 1 for name, t in state.items()}
            | {"teacher.module.head.mlp.0.weight": torch.ones(1), "mask_token": torch.ones(1), "centers": torch.ones(2)}
        },
        "ibot full": {
            "student": {f"module.backbone.{name}": t + 1 for name, t in state.items()} | self_distillation("module."),
            "teacher": {f"backbone.{name}": t for name, t in state.items()} | self_distillation(""),
            "ibot_loss": {"center": torch.zeros(1, 8), "center2": torch.zeros(1, 1, 8)},
            "optimizer": {"state": {}},
            "epoch": 800,
        },
        "ibot student": {
            "student": {f"module.backbone.{name}": t for name, t in state.items()} | self_distillation("module.")
        },
        "ibot backbone": {"state_dict": state | {"masked_embed": torch.zeros(1, 64)}},
        "ddp": {"model": {f"module.{name}": t for name, t in state.items()}},
        "compiled": {"model": {f"_orig_mod.{name}": t for name, t in state.items()}},
        "ddp of compiled": {"model": {f"module._orig_mod.{name}": t for name, t in state.items()}},
        "compiled blocks": {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in state.items()},
    }[layout]


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("flat", "timm"),
        ("timm", "timm"),
        ("mae encoder", "timm"),
        ("mae full", "mae"),
        ("hpm", "hpm"),
        ("hpm average", "hpm"),
        ("run with teacher", "mim run"),
        ("run", "mim run"),
        ("teacher run", "mim run"),
        ("ibot full", "ibot"),
        ("ibot student", "ibot"),
        ("ibot backbone", "ibot"),
        ("ddp", "timm"),
        ("compiled", "timm"),
        ("ddp of compiled", "timm"),
        ("compiled blocks", "timm"),
    ],
)
def test_every_layout_gives_back_the_encoder(vit, layout, name):
    state = vit.state_dict()
    found, tensors = to_timm(named_tensors(in_layout(layout, state)))
    assert found == name
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], state[key]) for key in state)


@pytest.mark.parametrize("checkpoint", [None, 3, "text", [torch.ones(2)], {}, {"model": {}}, {"epoch": 3, "lr": 0.1}])
def test_what_is_no_checkpoint_has_no_tensors(checkpoint):
    assert named_tensors(checkpoint) == {}


def test_layer_scale_of_self_distillation_gets_timms_names():
    names = ("attn.qkv.weight", "gamma_1", "gamma_2")
    tensors = {f"backbone.blocks.0.{name}": torch.ones(2) for name in names}
    assert to_timm(tensors)[1].keys() == {f"blocks.0.{name}" for name in ("attn.qkv.weight", "ls1.gamma", "ls2.gamma")}

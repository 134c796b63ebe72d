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


def in_layout(layout, state):
    """A checkpoint as the programs write it."""
    return {
        "flat": state,
        "timm": {"state_dict": state, "epoch": 3, "arch": "test_vit"},
        "mae encoder": {"model": state},
        "mae full": {"model": {**state, **mae_decoder()}},
        "run": {
            "state_dict": {f"encoder.vit.{name}": t for name, t in state.items()}
            | {"decoder.fill.token": torch.ones(1)},
            "optimizer_states": [{"state": {0: torch.ones(3)}}],
        },
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
        ("run", "mim run"),
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

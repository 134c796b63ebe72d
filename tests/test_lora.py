"""Additions of low rank: nothing at first, learned alone, one with the weights in whatever leaves a run."""

import copy

import pytest
import torch
from torch import nn

from mim.encoder import Encoder
from mim.interop import ModelCard, export_backbone
from mim.interop.reading import read_vit
from mim.lora import LoRALinear, merge, set_aside

MODELS = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",  # reads the weight of its layer itself, for biases of queries and values
    "eva02_base_patch16_clip_224",  # queries, keys and values apart
    "vit_base_patch16_rope_reg1_gap_256",
]
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(model, lora=None):
    torch.manual_seed(0)
    return Encoder(model, 32, 8, kwargs=SMALL, lora=lora).eval()


def learned(model):
    """An encoder whose additions are large enough to be seen."""
    encoder = build(model, lora=3)
    for part in encoder.modules():
        if isinstance(part, LoRALinear):
            nn.init.normal_(part.up)
    return encoder


@pytest.mark.parametrize("model", MODELS)
def test_an_addition_changes_nothing_at_first_and_the_weights_are_those_of_an_encoder_without(model):
    adapted, plain = build(model, lora=3), build(model)
    assert torch.equal(adapted(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("model", MODELS)
def test_every_addition_gets_a_gradient_and_nothing_else_of_the_encoder_does(model):
    encoder = learned(model)
    encoder(IMAGES).square().sum().backward()
    reached = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    additions = {name for name, _ in encoder.named_parameters() if name.endswith((".up", ".down"))}
    assert reached == additions
    assert all(p.requires_grad == (name in additions) for name, p in encoder.named_parameters())
    layers = [part for part in encoder.modules() if isinstance(part, LoRALinear)]
    assert len(additions) == 2 * len(layers) >= 8


@pytest.mark.parametrize("model", MODELS)
def test_merged_weights_are_timms_model_and_give_the_same(model):
    encoder = learned(model)
    expected, names = encoder(IMAGES), set(build(model).state_dict())
    merged = copy.deepcopy(encoder)
    merge(merged.vit)
    assert set(merged.state_dict()) == names
    assert torch.equal(merged(IMAGES), expected)
    assert not torch.equal(expected, build(model)(IMAGES))


def test_an_export_reloads_in_timm_and_leaves_the_run_as_it_was(tmp_path):
    encoder = learned("vit_small_patch16_dinov3")
    before, expected = copy.deepcopy(encoder.state_dict()), encoder(IMAGES)
    card = ModelCard("MAE", "photos")
    args = {"mean": [0.5] * 3, "std": [0.5] * 3, "card": card, "model_args": SMALL}
    assert export_backbone(encoder.vit, tmp_path / "backbone", **args) == 0
    assert list(encoder.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(encoder(IMAGES), expected)


def test_a_checkpoint_is_read_with_its_additions(tmp_path):
    encoder = learned("vit_tiny_patch16_224")
    torch.save({"state_dict": {f"encoder.{k}": v for k, v in encoder.state_dict().items()}}, tmp_path / "step-3.ckpt")
    _, tensors = read_vit(tmp_path / "step-3.ckpt")
    plain = build("vit_tiny_patch16_224")
    plain.vit.load_state_dict(tensors)
    assert torch.equal(plain(IMAGES), encoder(IMAGES))


def test_weights_are_filled_in_under_timms_names_and_the_additions_come_back():
    encoder, filled = learned("vit_tiny_patch16_224"), build("vit_tiny_patch16_224")
    additions = {name: p for name, p in encoder.named_parameters() if name.endswith((".up", ".down"))}
    for parameter in filled.parameters():
        nn.init.normal_(parameter)
    with set_aside(encoder.vit):
        encoder.load_state_dict(filled.state_dict())
    assert {name: p for name, p in encoder.named_parameters() if name in additions} == additions
    layer, weight = encoder.vit.blocks[0].attn.qkv, filled.vit.blocks[0].attn.qkv.weight
    assert torch.equal(layer.weight, weight + layer.up @ layer.down)
    assert not torch.equal(layer.weight, weight)

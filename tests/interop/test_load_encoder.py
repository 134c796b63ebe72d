"""``--weights``: what every evaluation starts from."""

import pytest
import timm
import torch

from mim.errors import UserError
from mim.interop import ModelCard, export_backbone
from mim.run.weights import load_encoder, untrained_encoder


@pytest.fixture
def vit():
    return timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0).eval()


@pytest.fixture
def folder(vit, tmp_path):
    export_backbone(vit, tmp_path / "backbone", mean=[0.1] * 3, std=[0.2] * 3, card=ModelCard("MAE", "photos"))
    return tmp_path / "backbone"


def test_a_timm_folder_gives_its_features_and_its_normalisation(vit, folder):
    loaded = load_encoder(str(folder))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.encoder(images), vit.forward_features(images))
    assert (loaded.mean, loaded.std) == ([0.1] * 3, [0.2] * 3)
    assert not loaded.encoder.training


def test_another_size_resizes_positions_and_says_so(folder):
    loaded = load_encoder(str(folder), img_size=64)
    assert loaded.encoder.grid == (8, 8)
    assert "pos_embed resized 4x4 -> 8x8" in loaded.note


def test_a_file_of_a_known_shape_needs_no_model_name(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save({"model": vit.state_dict()}, tmp_path / "x.pth")
    loaded = load_encoder(str(tmp_path / "x.pth"))
    assert torch.equal(loaded.encoder.vit.blocks[3].mlp.fc1.weight, vit.blocks[3].mlp.fc1.weight)


def test_a_file_of_an_unknown_shape_asks_for_the_model(vit, tmp_path):
    torch.save(vit.state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not say which model"):
        load_encoder(str(tmp_path / "x.pth"))


def test_messages_name_the_option_that_was_given(tmp_path):
    for weights in (str(tmp_path), str(tmp_path / "nothing")):
        with pytest.raises(UserError, match="--weights") as refused:
            load_encoder(weights)
        assert "--init" not in str(refused.value)


def test_untrained_encoders_have_the_same_shape_and_depend_on_the_seed(folder):
    state = torch.get_rng_state()
    first, again, other = (untrained_encoder(str(folder), seed) for seed in (0, 0, 1))
    assert first.grid == (4, 4)
    assert torch.equal(first.vit.cls_token, again.vit.cls_token)
    assert not torch.equal(first.vit.blocks[0].attn.qkv.weight, other.vit.blocks[0].attn.qkv.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_file_of_other_channels_gives_its_own_patch_kernel(tmp_path):
    vit = timm.create_model("test_vit", in_chans=4, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "x.pth")
    loaded, untrained = (open_(str(tmp_path / "x.pth")) for open_ in (named, named_untrained))
    assert torch.equal(loaded.encoder.vit.patch_embed.proj.weight, vit.patch_embed.proj.weight)
    assert (loaded.mean, loaded.std) == ([0.5] * 4, [0.25] * 4)
    assert "normalised by 0.5 and 0.25, as it does not say by what" in loaded.note
    assert untrained.in_chans == 4


def named(weights):
    return load_encoder(weights, model="test_vit")


def named_untrained(weights):
    return untrained_encoder(weights, seed=0, model="test_vit")


@pytest.mark.parametrize(
    ("kwargs", "pool"),
    [
        ({}, "cls"),
        ({"global_pool": "avg"}, "mean"),
        ({"global_pool": "avg", "fc_norm": False}, "mean"),
        ({"global_pool": "map"}, "mean"),
        ({"global_pool": ""}, "cls"),
        ({"class_token": False, "global_pool": ""}, "mean"),
    ],
)
def test_a_foreign_folder_pools_as_its_model_does(kwargs, pool, tmp_path):
    vit = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0, **kwargs)
    export_backbone(vit, tmp_path / "x", mean=[0.5] * 3, std=[0.5] * 3, card=ModelCard("MAE", "photos"))
    assert load_encoder(str(tmp_path / "x")).pool == pool


def test_images_of_any_size_stay_possible_if_the_folder_says_so(tmp_path):
    vit = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0, dynamic_img_size=True)
    export_backbone(vit, tmp_path / "x", mean=[0.5] * 3, std=[0.5] * 3, card=ModelCard("MAE", "photos"))
    assert load_encoder(str(tmp_path / "x")).encoder.vit.dynamic_img_size

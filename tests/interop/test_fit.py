import pytest
import timm
import torch

from mim.interop import adapt, likely_model


def tiny(img_size=32, patch_size=8, **kwargs):
    return timm.create_model("test_vit", img_size=img_size, patch_size=patch_size, num_classes=0, **kwargs)


@pytest.mark.parametrize(
    "kwargs", [{}, {"reg_tokens": 2}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}]
)
def test_positions_are_resized_and_those_of_the_prefix_stay(kwargs):
    small, large = tiny(32, **kwargs), tiny(64, **kwargs)
    tensors, notes = adapt(small.state_dict(), large)
    prefix = small.pos_embed.shape[1] - 16
    assert tensors["pos_embed"].shape == large.pos_embed.shape
    assert torch.equal(tensors["pos_embed"][:, :prefix], small.pos_embed[:, :prefix])
    assert notes == ["pos_embed resized 4x4 -> 8x8"]


def test_equal_grids_are_left_alone():
    vit = tiny()
    tensors, notes = adapt(vit.state_dict(), tiny())
    assert torch.equal(tensors["pos_embed"], vit.pos_embed)
    assert notes == []


def test_a_recorded_grid_need_not_be_square():
    wide, square = tiny((16, 64)), tiny(64)
    tensors, notes = adapt(wide.state_dict(), square, grid=(2, 8))
    assert notes == ["pos_embed resized 2x8 -> 8x8"]
    assert tensors["pos_embed"].shape == square.pos_embed.shape


def test_an_unknown_grid_that_is_no_square_stays_unmatched():
    wide = tiny((16, 32))  # 2 x 4 patches
    tensors, notes = adapt(wide.state_dict(), tiny())
    assert torch.equal(tensors["pos_embed"], wide.pos_embed)
    assert notes == []


def test_rgb_weights_are_adapted_to_other_channels():
    grey = tiny(in_chans=1)
    rgb = tiny().state_dict()
    tensors, notes = adapt(rgb, grey)
    expected = rgb["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(tensors["patch_embed.proj.weight"], expected)
    assert notes == ["patch_embed adapted 3 -> 1 channels"]


def test_patch_embedding_is_resized():
    tensors, notes = adapt(tiny(64, 16).state_dict(), tiny(32, 8))
    assert tensors["patch_embed.proj.weight"].shape == (64, 3, 8, 8)
    assert notes == ["patch_embed resized 16x16 -> 8x8"]


def test_the_given_tensors_are_not_changed():
    state = tiny(32).state_dict()
    adapt(state, tiny(64))
    assert state["pos_embed"].shape == (1, 17, 64)


@pytest.mark.parametrize(
    ("width", "depth", "patch_size", "name"),
    [
        (192, 12, 16, "vit_tiny_patch16_224"),
        (768, 12, 32, "vit_base_patch32_224"),
        (1280, 32, 14, "vit_huge_patch14_224"),
    ],
)
def test_the_model_is_guessed_from_shapes(width, depth, patch_size, name):
    blocks = {f"blocks.{block}.norm1.weight": torch.ones(1) for block in range(depth)}
    kernel = torch.empty(width, 3, patch_size, patch_size)
    assert likely_model({"patch_embed.proj.weight": kernel, **blocks}) == name


def test_no_guess_for_what_timm_does_not_have():
    assert likely_model(tiny().state_dict()) is None
    assert likely_model({"fc.weight": torch.ones(2, 2)}) is None

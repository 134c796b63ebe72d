import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from small_models import SMALL, build

from mim.reduction import ClassAttention, Counts, KeepRate, PerBlock, TokenReducedViT, ToMe, TopKPruning


@pytest.mark.parametrize("pool", ["avg", "avgmax", "max", "map", "token"])
@pytest.mark.parametrize("include_prefix", [False, True])
def test_pooling_of_merged_twins_is_that_of_the_whole_image(pool, include_prefix):
    """Without positions, an image of equal pairs is the same function of its merged tokens."""
    changes = {"pos_embed": "none", "global_pool": pool, "pool_include_prefix": include_prefix, "img_size": (8, 48)}
    vit = build("plain", **changes)
    images = torch.randn(2, 3, 8, 24).unflatten(3, (3, 8)).repeat_interleave(2, dim=3).flatten(3)
    wrapper = TokenReducedViT(vit, ToMe(Counts([3] * 4)))
    tokens = wrapper.forward_tokens(images)
    assert tokens.sizes.tolist() == [[2.0] * 3] * 2
    torch.testing.assert_close(wrapper(images), vit(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", ["avg", "avgmax", "max", "map"])
def test_no_pooling_sees_a_token_that_stands_for_no_patch(images, pool):
    vit = build("plain", global_pool=pool)
    wrapper = TokenReducedViT(vit, TopKPruning(KeepRate(0.5, at=[3]), ClassAttention(), fuse=True))
    tokens = wrapper.forward_tokens(images)
    others = replace(tokens, x=tokens.x[:, :-1], places=tokens.places[:, :-1], merged=False)
    torch.testing.assert_close(wrapper.forward_head(tokens), wrapper.forward_head(others))


def test_attention_pooling_of_the_eva_family_counts_sizes():
    vit = timm.create_model("vit_pe_core_tiny_patch16_384", img_size=64, depth=4, num_classes=5).eval()
    wrapper = TokenReducedViT(vit, ToMe(PerBlock(2)))
    assert wrapper(torch.randn(2, 3, 64, 64)).shape == vit(torch.randn(2, 3, 64, 64)).shape


def test_dense_features_lie_where_their_patches_are():
    """With blocks that do nothing, the dense map is the embedding of the image."""
    vit = build("plain")
    for parameter in vit.blocks.parameters():
        torch.nn.init.zeros_(parameter)
    images = torch.randn(2, 3, 40, 40)
    expected = vit.norm(vit._pos_embed(vit.patch_embed(images)))[:, 1:].transpose(1, 2).view(2, 16, 5, 5)
    pruned = TokenReducedViT(vit, TopKPruning(KeepRate(0.5), ClassAttention()))
    assert torch.equal(pruned.forward_dense(images), expected)


def test_a_pool_that_needs_the_whole_grid_is_refused():
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL, global_pool="prr")
    with pytest.raises(TypeError, match="AttentionPoolPrr"):
        TokenReducedViT(vit, ToMe(PerBlock(2)))


@pytest.mark.parametrize("model", ["plain", "EVA-02"])
def test_patches_that_timm_drops_by_itself_are_refused(model):
    vit = build(model, patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match="patch_drop_rate"):
        TokenReducedViT(vit, ToMe(PerBlock(2)))(torch.randn(1, 3, 40, 40))


def test_the_wrapper_takes_the_mode_of_the_model():
    assert not TokenReducedViT(build("plain"), ToMe(PerBlock(2))).training
    assert TokenReducedViT(build("plain").train(), ToMe(PerBlock(2))).reduction.training


def test_the_state_loads_into_the_model_alone():
    vit = build("plain")
    wrapper = TokenReducedViT(vit, ToMe(PerBlock(2)))
    build("plain").load_state_dict(wrapper.vit.state_dict())


def test_the_lines_of_the_readme_work():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(import timm\nfrom mim.reduction.*?)```", text, re.DOTALL)
    names = {}
    exec(lines.replace("vit_large_patch16_224", "vit_tiny_patch16_224").replace("pretrained=True", "depth=2"), names)
    assert names["fast"](torch.randn(1, 3, 224, 224)).shape == (1, 1000)

"""Queries and keys that timm's fused attention passes by, and the two halves of a block."""

import copy

import pytest
import torch
from small_models import MODELS, ROTARY, build

from mim.reduction import ClassAttention, KeepRate, TokenReducedViT, TopKPruning
from mim.reduction.attention import Attending, mlp_half


def first_block(vit, images):
    """Block 0, what enters it, and what it needs beside."""
    embedded = vit._pos_embed(vit.patch_embed(images))
    x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    return vit.blocks[0], vit.norm_pre(x), {} if rope is None else {"rope": rope[0] if rope.ndim == 4 else rope}


def unfused(block, x, inputs):
    """Rows of the softmax, ``(B, heads, T, T)``, as timm writes them out on its slow path."""
    slow, seen = copy.deepcopy(block.attn), []
    slow.fused_attn = False
    slow.attn_drop.register_forward_pre_hook(lambda _, rows: seen.append(rows[0]))
    slow(block.norm1(x), **inputs)
    return seen[0]


@pytest.mark.parametrize("model", MODELS)
def test_attention_is_that_of_the_unfused_path(models, images, model):
    vit = models[model]
    prefix = vit.num_prefix_tokens
    block, x, inputs = first_block(vit, images)
    attending = Attending(block, prefix)
    attending.half(x, **inputs)
    expected = unfused(block, x, inputs)
    if prefix:
        torch.testing.assert_close(attending.class_attention(), expected[:, :, 0, prefix:].mean(1))
    torch.testing.assert_close(attending.received_attention(), expected[:, :, prefix:, prefix:].mean((1, 2)))
    rows = expected[:, :, [prefix, prefix + 12], prefix:].mean((1, 2))
    torch.testing.assert_close(attending.received_attention(2), rows)


@pytest.mark.parametrize("model", MODELS)
def test_the_two_halves_are_the_block_to_the_bit(models, images, model):
    block, x, inputs = first_block(models[model], images)
    halves = mlp_half(block, Attending(block, models[model].num_prefix_tokens).half(x, **inputs))
    assert torch.equal(halves, block(x, **inputs))


def test_only_patches_that_are_alive_are_asked():
    block, x = build("plain").blocks[0], torch.randn(2, 1 + 6, 16)
    alive = torch.tensor([[True, True, False, True, False, True]] * 2)
    attending = Attending(block, 1)
    attending.half(x)
    expected = unfused(block, x, {})[:, :, 1:, 1:].mean(1)[:, alive[0]].mean(1)
    torch.testing.assert_close(attending.received_attention(alive=alive), expected)


def test_scores_are_taken_before_dropout_and_stochastic_depth(images):
    vit = build("plain", attn_drop_rate=0.5, drop_path_rate=0.5)
    wrapper = TokenReducedViT(vit, TopKPruning(KeepRate(0.5, at=[0]), ClassAttention()))
    chosen = wrapper.eval().forward_tokens(images).assign
    assert torch.equal(wrapper.train().forward_tokens(images).assign, chosen)


@pytest.mark.parametrize("model", ROTARY)
def test_a_token_that_stands_nowhere_is_not_turned(models, images, model):
    """Only what is fused of several places stands nowhere: its queries and keys are those without rotary positions."""
    vit = models[model]
    prefix = vit.num_prefix_tokens
    reduction = TopKPruning(KeepRate(0.5, at=[0]), ClassAttention(), fuse=True)
    _, x, _ = first_block(vit, images)
    rope = vit._pos_embed(vit.patch_embed(images))[1]
    (tokens,) = reduction.after_blocks([0], vit.blocks, x, prefix, (5, 5), rope)
    turned = tokens.inputs(1)["rope"]
    attending = Attending(vit.blocks[1], prefix)
    vectors = torch.randn(3, 2, tokens.count, 8)
    attending.inputs = {"rope": turned}
    assert torch.equal(attending._turn(vectors, turned)[:, :, -1], vectors[:, :, -1])
    assert not torch.allclose(attending._turn(vectors, turned)[:, :, 1:-1], vectors[:, :, 1:-1])

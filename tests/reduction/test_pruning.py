import pytest
import torch
from small_models import build
from timm.layers.attention import Attention

from mim.reduction import (
    ClassAttention,
    Counts,
    Duplication,
    KeepRate,
    RandomScore,
    ReceivedAttention,
    Tokens,
    TopKPruning,
)
from mim.reduction.attention import Attending


def attention_matrix(attn: Attention, x: torch.Tensor) -> torch.Tensor:
    """Rows of the softmax, ``(B, heads, T, T)``, written out."""
    batch, length, width = x.shape
    q, k, _ = attn.qkv(x).view(batch, length, 3, attn.num_heads, width // attn.num_heads).permute(2, 0, 3, 1, 4)
    return (attn.q_norm(q) @ attn.k_norm(k).transpose(2, 3) * attn.scale).softmax(-1)


@pytest.mark.parametrize("normalise", [False, True])
def test_the_fused_token_is_the_sum_weighted_by_class_attention(normalise):
    """EViT written as a loop: keep the most attended, sum up the rest, then the MLP on what is left."""
    block = build("plain").blocks[0]
    x = torch.randn(2, 1 + 6, 16)
    attention = attention_matrix(block.attn, block.norm1(x))[:, :, 0, 1:].mean(1)
    middle = x + block.attn(block.norm1(x))
    reduction = TopKPruning(Counts([4]), ClassAttention(), fuse=True, normalise=normalise)
    tokens = reduction(torch.nn.Sequential(block), x, 1)
    for row in range(2):
        kept = sorted(attention[row].argsort(descending=True)[:4].tolist())
        lost = [patch for patch in range(6) if patch not in kept]
        fused = sum(attention[row, patch] * middle[row, 1 + patch] for patch in lost)
        fused = fused / sum(attention[row, patch] for patch in lost) if normalise else fused
        left = torch.stack([middle[row, 0], *(middle[row, 1 + patch] for patch in kept), fused])
        torch.testing.assert_close(tokens.x[row], left + block.mlp(block.norm2(left)), rtol=1e-5, atol=1e-5)
        assert tokens.assign[row].tolist() == [kept.index(n) if n in kept else ~lost.index(n) for n in range(6)]


def test_the_fused_token_stands_for_no_patch():
    """Means and dense features go by the patches: what was fused comes back as it was."""
    block, x = build("plain").blocks[0], torch.randn(2, 1 + 6, 16)
    attending = Attending(block, 1)
    middle = attending.half(x)
    reduction = TopKPruning(Counts([3]), ClassAttention(), fuse=True)
    tokens = reduction.reduce(Tokens.start(middle, 1), attending, 4, 0)
    assert tokens.sizes.tolist() == [[1, 1, 1, 0]] * 2
    assert torch.equal(tokens.dense(), middle[:, 1:])
    torch.testing.assert_close(tokens.patch_mean(), tokens.patches[:, :3].mean(1))
    assert torch.equal(tokens.rejoined().x, middle)


def test_the_fused_token_is_an_ordinary_one_at_the_next_stage():
    assert TopKPruning(KeepRate(0.7), ClassAttention(), fuse=True).counts(196, 12) == [
        *[196] * 3,
        *[139] * 3,
        *[99] * 3,
        *[71] * 3,
    ]


def test_only_scores_that_cannot_be_negative_weigh_a_sum():
    with pytest.raises(ValueError, match="RandomScore can be negative"):
        TopKPruning(KeepRate(0.5), RandomScore(), fuse=True)


def test_kept_tokens_stay_in_raster_order():
    vit = build("plain")
    tokens = TopKPruning(KeepRate(0.5), ReceivedAttention())(vit.blocks, torch.randn(2, 26, 16), 1)
    for row in tokens.assign:
        alive = row[row >= 0]
        assert alive.tolist() == sorted(alive.tolist())


def test_duplicates_of_the_pivots_go_first():
    vit = build("plain", pos_embed="none")
    x = torch.randn(1, 1 + 4, 16).repeat(1, 2, 1)[:, 1:]  # class token, then three patches, one of them its twin, ...
    tokens = TopKPruning(Counts([8, 5, 5, 5]), Duplication(pivots=4))(vit.blocks, x, 1)
    assert tokens.count == 5
    unit = torch.nn.functional.normalize(tokens.patches[0].detach(), dim=-1)
    assert len({tuple(row.round(decimals=3).tolist()) for row in unit}) >= 4


def test_rejoined_patches_carry_the_value_they_had_when_dropped():
    vit = build("plain")
    x = torch.randn(2, 26, 16)
    reduction = TopKPruning(Counts([25, 10, 10, 10]), ClassAttention(), place="after", rejoin=True)
    before = []
    handle = vit.blocks[3].register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    out = reduction(vit.blocks, x, 1)
    handle.remove()
    after_two = vit.blocks[1](vit.blocks[0](x))
    middle = TopKPruning(Counts([25, 10, 10]), ClassAttention(), place="after")(vit.blocks[:3], x, 1)
    for row in range(2):
        for patch in range(25):
            lost = middle.assign[row, patch] < 0
            expected = after_two[row, 1 + patch] if lost else middle.patches[row, middle.assign[row, patch]]
            assert torch.equal(before[0][row, 1 + patch], expected)
    assert torch.equal(out.x, vit.blocks[3](before[0]))
    assert out.count == 25

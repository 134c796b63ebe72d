import pytest
import torch
from small_models import build

from mim.reduction import LearnedThresholds, TokenReducedViT, TopKPruning


def wrapper(threshold, **settings):
    reduction = LearnedThresholds(4, **settings)
    reduction.thresholds.data.fill_(threshold)
    return TokenReducedViT(build("plain"), reduction)


def test_thresholds_start_at_a_hundredth_of_the_depth():
    assert LearnedThresholds(4).thresholds.tolist() == pytest.approx([0, 0.0025, 0.005, 0.0075])


def test_tokens_far_above_their_threshold_change_nothing(images):
    whole = build("plain")
    torch.testing.assert_close(wrapper(0.0)(images), whole(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wrapper(-1e3).train()(images), whole(images), rtol=1e-4, atol=1e-5)


def test_hidden_tokens_are_those_with_too_little_attention_and_stay_as_they_were(images):
    model = wrapper(0.038)
    first, last = model.reduction.after_blocks(
        [0, 3], model.vit.blocks, model.vit._pos_embed(model.vit.patch_embed(images)), 1
    )
    assert 0 < first.alive.sum() < first.alive.numel()
    assert not (last.alive & ~first.alive).any()
    dead = ~first.alive
    assert torch.equal(last.patches[dead], first.patches[dead])
    assert last.sizes.sum(1).tolist() == last.alive.sum(1).tolist()
    assert torch.equal(last.gone, ~last.alive)


def test_a_hidden_token_is_one_that_is_not_there(images):
    """Masks chosen after block 0 and kept: later blocks compute what they would on the shorter sequence."""
    model = wrapper(-1.0)
    model.reduction.thresholds.data[0] = 0.038
    x = model.vit._pos_embed(model.vit.patch_embed(images))
    first, last = model.reduction.after_blocks([0, 3], model.vit.blocks, x, 1)
    for row in range(len(images)):
        short = torch.cat([first.x[row, :1], first.patches[row, first.alive[row]]])[None]
        expected = model.vit.blocks[1:](short)
        torch.testing.assert_close(last.x[row, :1], expected[0, :1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last.patches[row, last.alive[row]], expected[0, 1:], rtol=1e-4, atol=1e-4)


def test_in_training_a_soft_mask_multiplies_what_each_block_gives(images):
    """The first stage, block by block, in a loop; thresholds below zero take part."""
    model = wrapper(0.0, temperature=0.01).train()
    model.reduction.thresholds.data = torch.tensor([-0.01, 0.03, 0.038, 0.045])
    x = model.vit._pos_embed(model.vit.patch_embed(images))
    (last,) = model.reduction.after_blocks([3], model.vit.blocks, x, 1)
    for block, threshold in zip(model.vit.blocks, model.reduction.thresholds, strict=True):
        queries, keys = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.num_heads, -1)).unbind(2)[:2]
        attention = torch.einsum("bqhd,bkhd->bhqk", queries * block.attn.scale, keys).softmax(-1)
        scores = attention[:, :, 1:, 1:].mean((1, 2))  # by patches, of patches
        mask = torch.sigmoid((scores - threshold) / 0.01)
        x = block(x) * torch.cat([torch.ones(len(images), 1), mask], dim=1)[..., None]
    torch.testing.assert_close(last.x, x, rtol=1e-4, atol=1e-4)


def test_a_threshold_below_zero_learns(images):
    model = wrapper(-0.01, temperature=0.01).train()
    model.auxiliary_loss(model.forward_tokens(images), torch.tensor([0, 1, 2])).backward()
    assert (model.reduction.thresholds.grad != 0).all()


def test_an_impossible_threshold_leaves_one_token(images):
    assert wrapper(2.0).forward_tokens(images).alive.sum(1).tolist() == [1, 1, 1]
    assert wrapper(2.0)(torch.zeros_like(images)).isfinite().all()


def test_thresholds_learn_from_the_task_and_from_the_price_of_tokens(images):
    model = wrapper(0.038, temperature=0.01, weight=0.5).train()
    tokens = model.forward_tokens(images)
    labels = torch.tensor([0, 1, 2])
    price = model.auxiliary_loss(tokens, labels)
    torch.testing.assert_close(price, 0.5 * sum(share.mean() for share in tokens.auxiliary))
    (gradient,) = torch.autograd.grad(price, model.reduction.thresholds, retain_graph=True)
    assert (gradient < 0).all()  # a higher threshold is cheaper
    model.forward_head(tokens).sum().backward()
    # The class token has read its last patches before the last block hides some.
    assert (model.reduction.thresholds.grad != 0).tolist() == [True, True, True, False]


def test_with_hard_masks_thresholds_rest_while_the_model_learns(images):
    model = wrapper(0.038, hard=True).train()
    tokens = model.forward_tokens(images)
    assert tokens.alive.dtype == torch.bool
    assert model.auxiliary_loss(tokens, torch.tensor([0, 1, 2])).item() == 0
    model.forward_head(tokens).sum().backward()
    assert model.reduction.thresholds.grad is None


def test_what_was_learnt_becomes_fixed_numbers(images):
    model = wrapper(0.038)
    x = model.vit._pos_embed(model.vit.patch_embed(images))
    fixed = model.reduction.static(model.vit.blocks, x, 1)
    assert isinstance(fixed, TopKPruning)
    shares = [
        state.alive.float().mean().item() for state in model.reduction.after_blocks(range(4), model.vit.blocks, x, 1)
    ]
    assert fixed.counts(25, 4) == [max(1, round(25 * share)) for share in shares]
    short = TokenReducedViT(model.vit, fixed)
    assert short.forward_tokens(images).count == fixed.counts(25, 4)[-1]

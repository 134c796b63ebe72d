"""What holds for every reduction and every model."""

import copy

import pytest
import timm
import torch
from small_models import EVERY, HIDING, IDLE, MERGING, MODELS, REDUCTIONS, ROTARY, SMALL, TRAINED, build, fits
from timm.models.vision_transformer import ParallelScalingBlock

from mim.reduction import ClassAttention, Counts, KeepRate, PerBlock, RandomScore, TokenReducedViT, ToMe, TopKPruning

PAIRS = [(model, reduction) for model in MODELS for reduction in REDUCTIONS if fits(model, reduction)]
ALL_PAIRS = [(model, reduction) for model in MODELS for reduction in IDLE if fits(model, reduction)]


@pytest.mark.parametrize(("model", "reduction"), ALL_PAIRS)
def test_a_model_with_nothing_to_reduce_is_timm_to_the_bit(models, images, model, reduction):
    vit = models[model]
    wrapper = TokenReducedViT(vit, IDLE[reduction]())
    for training in (True, False):
        wrapper.train(training)
        assert torch.equal(wrapper(images), vit(images))
    assert torch.equal(wrapper.forward_features(images), vit.forward_features(images))


@pytest.mark.parametrize(("model", "reduction"), PAIRS)
def test_counts_follow_the_schedule_and_every_patch_is_accounted_for(models, images, model, reduction):
    wrapper = TokenReducedViT(models[model], REDUCTIONS[reduction](KeepRate(0.7)))
    tokens = wrapper.forward_tokens(images)
    count = 25 if wrapper.reduction.rejoin else wrapper.reduction.counts(25, 4, (5, 5))[-1]
    assert tokens.x.shape == (3, models[model].num_prefix_tokens + count, models[model].embed_dim)
    for row, sizes in zip(tokens.assign, tokens.sizes, strict=True):
        assert sizes.tolist() == row[row >= 0].bincount(minlength=count).tolist()
    if reduction in MERGING:
        assert tokens.sizes.sum(1).tolist() == [25] * 3
    else:  # each stands for itself, a fused one for none
        assert set(tokens.sizes.unique().tolist()) == ({0, 1} if reduction in ("fused", "fused mean") else {1})
        assert torch.equal(tokens.sizes.sum(1), 25.0 - tokens.gone.sum(1))
    assert tokens.x.isfinite().all()
    assert wrapper.forward_dense(images).shape == (3, models[model].embed_dim, 5, 5)


@pytest.mark.parametrize("reduction", EVERY)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model", ["registers", "DINOv3", "distilled"])
def test_prefix_tokens_never_move(models, model, reduction, training):
    vit = models[model]
    blocks = doing_nothing(vit.blocks)
    x = torch.randn(2, vit.num_prefix_tokens + 25, 16)
    tokens = EVERY[reduction]().train(training)(blocks, x, vit.num_prefix_tokens, (5, 5))
    assert torch.equal(tokens.x[:, : vit.num_prefix_tokens], x[:, : vit.num_prefix_tokens])
    assert tokens.x.shape != x.shape or reduction in ("rejoined", "Cropr", *HIDING) or training


def doing_nothing(blocks):
    """Copies whose attention and MLP add nothing to the sequence."""
    blocks = copy.deepcopy(blocks)
    for block in blocks:
        for parameter in [*block.attn.proj.parameters(), *block.mlp.parameters()]:
            torch.nn.init.zeros_(parameter)
    return blocks


@pytest.mark.parametrize("reduction", EVERY)
@pytest.mark.parametrize("model", ["registers", "DINOv3"])
def test_an_image_does_not_depend_on_its_batch(models, images, model, reduction):
    wrapper = TokenReducedViT(models[model], EVERY[reduction]()).eval()
    single = torch.cat([wrapper(image[None]) for image in images])
    torch.testing.assert_close(wrapper(images), single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_image_of_one_colour_and_absurd_schedules_give_numbers(models, reduction):
    for schedule in (KeepRate(0.01), PerBlock(24), PerBlock(7)):
        wrapper = TokenReducedViT(models["plain"], REDUCTIONS[reduction](schedule))
        counts = wrapper.reduction.counts(25, 4, (5, 5))
        assert min(counts) >= 1
        tokens = wrapper.forward_tokens(torch.full((2, 3, 40, 40), 0.5))
        assert tokens.count == (25 if wrapper.reduction.rejoin else counts[-1])
        assert tokens.x.isfinite().all()
        assert wrapper.forward_dense(torch.zeros(2, 3, 40, 40)).isfinite().all()


@pytest.mark.parametrize("reduction", [*TRAINED, *HIDING])
@pytest.mark.parametrize("training", [False, True])
def test_an_image_of_one_colour_gives_numbers_where_scores_are_learnt(models, reduction, training):
    wrapper = TokenReducedViT(models["plain"], EVERY[reduction]()).train(training)
    assert wrapper(torch.full((2, 3, 40, 40), 0.5)).isfinite().all()
    assert wrapper.eval().forward_dense(torch.zeros(2, 3, 40, 40)).isfinite().all()


@pytest.mark.parametrize("batch", [2, 3])  # rotary tables are ambiguous where a batch is as large as there are heads
@pytest.mark.parametrize("model", ["plain", "normalised keys", "registers", *ROTARY])
def test_pruning_equals_hiding_the_dropped_keys(models, images, model, batch):
    vit, images = models[model], images[:batch]
    wrapper = TokenReducedViT(vit, TopKPruning(Counts([25, 10, 10, 10]), ClassAttention(), place="after"))
    tokens = wrapper.forward_tokens(images)
    embedded = vit._pos_embed(vit.patch_embed(images))
    x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    x, prefix = vit.norm_pre(x), vit.num_prefix_tokens
    alive = torch.nn.functional.pad(tokens.assign >= 0, (prefix, 0), value=True)[:, None, None]
    for layer, block in enumerate(vit.blocks):
        kwargs = {} if rope is None else {"rope": rope[layer] if rope.ndim == 4 else rope}
        x = block(x, attn_mask=alive if layer > 1 else None, **kwargs)
    expected = vit.norm(x)[:, prefix:]
    for row, slots, ours in zip(expected, tokens.assign, tokens.patches, strict=True):
        torch.testing.assert_close(ours, row[slots >= 0], rtol=1e-4, atol=2e-5)


def test_duplicates_merged_with_proportional_attention_change_nothing():
    """Six patches, each twice side by side, are six merged tokens of size two: the same function."""
    vit = build("plain", pos_embed="none", depth=6)
    x = torch.randn(2, 6, 16).repeat_interleave(2, dim=1)
    x = torch.cat([torch.randn(2, 1, 16), x], dim=1)
    expected = vit.blocks(x)
    merged = ToMe(Counts([6] * 6))(vit.blocks, x, 1)
    assert merged.sizes.tolist() == [[2.0] * 6] * 2
    torch.testing.assert_close(merged.x[:, 0], expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.dense(), expected[:, 1:], rtol=1e-4, atol=1e-5)
    without = ToMe(Counts([6] * 6), proportional=False)(vit.blocks, x, 1)
    assert (without.x[:, 0] - expected[:, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("reduction", ["fused mean", *MERGING])
def test_merged_tokens_stay_inside_what_they_are_made_of(reduction):
    blocks = doing_nothing(build("plain").blocks[:1])
    x = torch.randn(2, 26, 16)
    patches = REDUCTIONS[reduction](KeepRate(0.6, at=[0]))(blocks, x, 1, (5, 5)).patches
    assert (patches <= x[:, 1:].amax(1, keepdim=True) + 1e-6).all()
    assert (patches >= x[:, 1:].amin(1, keepdim=True) - 1e-6).all()


@pytest.mark.parametrize("reduction", ["top-k", "fused", "duplication", "greedy duplication", *TRAINED])
def test_choosing_does_not_depend_on_the_order_of_the_tokens(models, reduction):
    blocks = models["plain"].blocks
    x, order = torch.randn(2, 26, 16), torch.randperm(25)
    shuffled = torch.cat([x[:, :1], x[:, 1:][:, order]], dim=1)
    reduction = EVERY[reduction]().eval()
    expected, ours = reduction(blocks, x, 1), reduction(blocks, shuffled, 1)
    torch.testing.assert_close(ours.x[:, 0], expected.x[:, 0])
    torch.testing.assert_close(ours.dense(), expected.dense()[:, order])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_reach_everything_that_is_left(reduction):
    vit = build("plain")
    wrapper = TokenReducedViT(vit, REDUCTIONS[reduction](KeepRate(0.6)))
    wrapper(torch.randn(2, 3, 40, 40)).square().sum().backward()
    silent = [name for name, p in vit.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert silent == []


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_gradient_flows_through_scores(reduction):
    """With an attention that adds nothing, queries and keys matter to nothing but the choice."""
    blocks = build("plain").blocks[:1]
    for parameter in blocks[0].attn.proj.parameters():
        torch.nn.init.zeros_(parameter)
    tokens = REDUCTIONS[reduction](KeepRate(0.6, at=[0]))(blocks, torch.randn(2, 26, 16), 1, (5, 5))
    tokens.x.square().sum().backward()
    assert blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert not blocks[0].attn.qkv.weight.grad.any()


@pytest.mark.parametrize("reduction", ["top-k", "ToMe", "random", *TRAINED, *HIDING])
def test_checkpointing_changes_no_gradient(reduction):
    gradients = []
    for checkpointing in (False, True):
        vit = build("plain", drop_path_rate=0.3)
        vit.set_grad_checkpointing(checkpointing)
        torch.manual_seed(2)
        wrapper = TokenReducedViT(vit, EVERY[reduction]()).train()
        wrapper(torch.randn(4, 3, 40, 40)).square().sum().backward()
        gradients.append(vit.blocks[0].mlp.fc1.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reduction", EVERY)
@pytest.mark.parametrize("model", ["plain", "DINOv3"])
def test_a_reduced_model_runs_in_half_precision(models, images, model, reduction):
    wrapper = TokenReducedViT(models[model], EVERY[reduction]()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert wrapper(images).isfinite().all()
        assert wrapper.forward_dense(images).isfinite().all()


def test_attention_stays_fused(models, images, monkeypatch):
    called = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kw: called.append(1) or fused(*args, **kw)
    )
    TokenReducedViT(models["plain"], ToMe(PerBlock(3)))(images)
    assert len(called) == 4


def test_the_model_is_left_as_it_was(images):
    vit = build("plain")
    expected, keys = vit(images), set(vit.state_dict())
    wrapper = TokenReducedViT(vit, ToMe(PerBlock(3)))
    TokenReducedViT(vit, TopKPruning(KeepRate(0.5), ClassAttention()))(images)  # nor is it in the way of another one
    torch.testing.assert_close(wrapper(images), TokenReducedViT(build("plain"), ToMe(PerBlock(3)))(images))
    assert torch.equal(wrapper.vit(images), expected)
    assert {key.removeprefix("vit.") for key in wrapper.state_dict()} == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())
    torch.testing.assert_close(copy.deepcopy(wrapper)(images), wrapper(images))


@pytest.mark.parametrize("size", [(40, 64), (24, 40)])
@pytest.mark.parametrize("model", ["plain", "DINOv3"])
def test_a_reduced_model_takes_other_image_sizes(size, model):
    vit = build(model, dynamic_img_size=True)
    for make in REDUCTIONS.values():
        assert TokenReducedViT(vit, make(KeepRate(0.6))).forward_dense(torch.randn(1, 3, *size)).shape == (
            *(1, 16),
            *(side // 8 for side in size),
        )


def test_random_draws_are_the_same_in_evaluation_and_fresh_in_training(images):
    vit = build("plain")
    reduction = TopKPruning(KeepRate(0.5), RandomScore(seed=1))
    wrapper = TokenReducedViT(vit, reduction)
    first, second = wrapper.forward_tokens(images).assign, wrapper.forward_tokens(images).assign
    assert torch.equal(first, second)
    other = TokenReducedViT(vit, TopKPruning(KeepRate(0.5), RandomScore(seed=2)))
    assert not torch.equal(other.forward_tokens(images).assign, first)
    wrapper.train()
    trained = wrapper.forward_tokens(images).assign
    assert not torch.equal(trained, first)
    assert not torch.equal(trained[0], trained[1])


def test_a_class_token_is_asked_for_only_where_there_is_one(models):
    with pytest.raises(TypeError, match="class token"):
        TokenReducedViT(models["no class token"], TopKPruning(KeepRate(0.5), ClassAttention()))


def test_blocks_of_another_kind_are_refused_in_their_middle_but_not_between_them():
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL, block_fn=ParallelScalingBlock)
    with pytest.raises(TypeError, match="ParallelScalingBlock"):
        TokenReducedViT(vit, ToMe(PerBlock(2)))
    between = TokenReducedViT(vit, TopKPruning(KeepRate(0.5), RandomScore(), place="after"))
    assert between(torch.randn(1, 3, 40, 40)).shape == (1, 5)


@pytest.mark.parametrize(("model", "kwargs"), [("beit_base_patch16_224", {"depth": 1}), ("resnet18", {})])
def test_models_of_another_kind_are_refused(model, kwargs):
    with pytest.raises(TypeError, match="neither a plain ViT nor of the Eva family"):
        TokenReducedViT(timm.create_model(model, **kwargs), ToMe(PerBlock(2)))

"""Learnable memory: what was there stays what it was, tasks do not meet, and a plain loop gives the same."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ResPostBlock, VisionTransformer

from mim.memory import ORIGINAL, MemoryViT, Task, check_memory
from mim.vit import without_weights

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
KINDS = {
    "plain": {},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "norm first": {"pre_norm": True, "init_values": 0.5},
    "norms of queries and keys": {"qk_norm": True, "qkv_bias": False},
    "mean": {"global_pool": "avg"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "rates": {"drop_path_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5},
}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(kind="plain", dtype=torch.float32):
    torch.manual_seed(1)
    vit = VisionTransformer(**SMALL, **KINDS[kind])
    for parameter in vit.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return vit.to(dtype)


def learned(vit, cells=5, classes=4, seed=0, normed=True):
    """A task whose numbers are large enough to be seen."""
    task = Task(vit, cells, [f"class {c}" for c in range(classes)], seed, normed).to(vit.patch_embed.proj.weight.dtype)
    for number, parameter in enumerate(task.parameters()):
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + number))
    return task


def looped(vit, task, images):
    """The logits of one task, token by token and head by head, as the paper tells it."""
    attention = [block.attn for block in vit.blocks]
    answers = []
    for image in images:
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0]
        class_token = task.class_token[0, 0]
        for layer, block in enumerate(vit.blocks):
            first = 0 if vit.cls_token is None else 1
            rows = [*(block.norm1(token) for token in tokens[first:]), block.norm1(class_token)]
            rows += [block.norm1(cell) if task.normed else cell for cell in task.memory[layer]]
            attended = []
            for head in range(2):
                part, size = attention[layer], attention[layer].head_dim
                q, k, v = (
                    [
                        F.linear(row, w[head * size : (head + 1) * size], b if b is None else b[head * size :][:size])
                        for row in rows
                    ]
                    for w, b in zip(
                        part.qkv.weight.chunk(3),
                        (None,) * 3 if part.qkv.bias is None else part.qkv.bias.chunk(3),
                        strict=True,
                    )
                )
                query = part.q_norm(q[len(tokens) - first])
                scores = torch.stack([query @ part.k_norm(key) for key in k]) * size**-0.5
                attended.append(sum(share * value for share, value in zip(scores.softmax(0), v, strict=True)))
            class_token = class_token + block.ls1(part.proj(torch.cat(attended)))
            class_token = class_token + block.ls2(block.mlp(block.norm2(class_token)))
            tokens = block(tokens[None])[0]
        answers.append(task.head(vit.fc_norm(vit.norm(class_token))))
    return torch.stack(answers)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_equals_a_loop_over_tokens_and_heads(kind, normed):
    vit = build(kind, torch.float64).eval()
    task, images = learned(vit, normed=normed), IMAGES[:2].double()
    torch.testing.assert_close(MemoryViT(vit, {"a": task})(images), looped(vit, task, images), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_own_answers_and_tokens_stay_as_they_are_to_the_bit(kind):
    vit = build(kind).eval()
    logits, tokens = vit(IMAGES), vit.forward_features(IMAGES)
    model = MemoryViT(vit, {"a": learned(vit), "b": learned(vit, 2, 3, seed=9)})
    assert torch.equal(model.forward_features(IMAGES)[0], tokens)
    assert torch.equal(model.by_task(IMAGES)[ORIGINAL], logits)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_further_task_leaves_an_earlier_ones_answers_and_predictions(kind, dtype, rounding):
    vit = build(kind, dtype).eval()
    images, first, second = IMAGES.to(dtype), learned(vit), learned(vit, 3, 6, seed=5, normed=False)
    before = MemoryViT(vit, {"a": first}).by_task(images)["a"]
    both = MemoryViT(vit, {"a": first, "b": second}).by_task(images)
    scale = before.abs().max()
    torch.testing.assert_close(both["a"] / scale, before / scale, atol=rounding, rtol=0)
    assert torch.equal(both["a"].argmax(1), before.argmax(1))
    alone = MemoryViT(vit, {"b": second}).by_task(images)["b"]
    torch.testing.assert_close(both["b"] / scale, alone / scale, atol=rounding, rtol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("no class token", "mean")])
def test_without_memory_a_new_task_starts_as_the_models_own_class_token(kind):
    vit = build(kind, torch.float64).eval()
    tokens, class_tokens = MemoryViT(vit, {"a": Task(vit, 0, "xyz").double()}).forward_features(IMAGES.double())
    torch.testing.assert_close(class_tokens[:, 0], tokens[:, 0], atol=1e-12, rtol=0)


def test_only_class_token_memory_and_classifier_learn():
    vit = build()
    model = MemoryViT(vit, {"a": learned(vit, cells=5, classes=4)})
    model(IMAGES).square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().amax(-1).all()}
    assert reached == {f"tasks.a.{part}" for part in ("class_token", "memory", "head.weight", "head.bias")}
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learning == 2 * 5 * 32 + 32 + (32 * 4 + 4)


def test_without_memory_class_token_and_classifier_learn():
    vit = build()
    assert sum(p.numel() for p in MemoryViT(vit, {"a": learned(vit, cells=0)}).parameters() if p.requires_grad) == (
        32 + 32 * 4 + 4
    )


def test_in_training_mode_the_model_that_stands_still_has_no_chance_in_it():
    vit = build("rates")
    model = MemoryViT(vit, {"a": learned(vit)}).train()
    assert torch.equal(model(IMAGES), model(IMAGES))
    assert torch.equal(model(IMAGES), copy.deepcopy(model).eval()(IMAGES))


def test_answers_of_several_tasks_stand_side_by_side():
    vit = build().eval()
    model = MemoryViT(vit, {"a": learned(vit), "b": learned(vit, 2, 3)})
    answers = model.by_task(IMAGES)
    assert {name: logits.shape[1] for name, logits in answers.items()} == {ORIGINAL: 5, "a": 4, "b": 3}
    torch.testing.assert_close(model(IMAGES), torch.cat([answers["a"], answers["b"]], dim=1))


def test_no_work_is_done_whose_result_nobody_takes():
    """With logits of tasks alone, the last block's attention and MLP run for class tokens only."""
    vit = build().eval()
    model, rows = MemoryViT(vit, {"a": learned(vit)}), []
    hook = vit.blocks[-1].mlp.register_forward_hook(lambda part, args, out: rows.append(args[0].shape[1]))
    model(IMAGES)
    model.by_task(IMAGES)
    hook.remove()
    assert rows == [1, 17, 1]


@pytest.mark.parametrize(
    ("name", "why"), [("vit_small_patch16_dinov3", "Eva is no plain ViT"), ("resnet10t", "ResNet is no plain ViT")]
)
def test_other_models_are_refused_by_name(name, why):
    with without_weights():
        other = timm.create_model(name)
    with pytest.raises(TypeError, match=why):
        check_memory(other)


def test_blocks_of_another_build_are_refused_by_name():
    with without_weights():
        other = VisionTransformer(**SMALL, block_fn=ResPostBlock)
    with pytest.raises(TypeError, match="ResPostBlock with Attention"):
        check_memory(other)

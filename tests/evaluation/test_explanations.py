"""Explanations against loops that spell them out, and patches that the answer is known to rest on."""

import pytest
import torch
from torch import nn

from mim.conv_encoder import ConvEncoder
from mim.encoder import Encoder
from mim.evaluation.explanations import EXPLANATIONS, classify, grad_cam, rollout, token_tm

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([1, 2])
KINDS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "mean": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "registers, no class token": ("vit_base_patch16_rope_reg1_gap_256", {}),
    "rotary": ("vit_small_patch16_dinov3", {}),
    "queries apart": ("eva02_tiny_patch14_224", {}),
}


def build(kind="class token"):
    torch.manual_seed(1)
    model, kwargs = KINDS[kind]
    encoder = Encoder(model, 32, 8, kwargs=SMALL | kwargs)
    encoder.vit.reset_classifier(4)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder.double().eval()


def attention_of(block, x, rope):
    """Attention of every token ``(heads, tokens, tokens)``, by timm's own way without fusing."""
    seen = []
    block.attn.fused_attn, drop = False, block.attn.attn_drop
    block.attn.attn_drop = nn.Identity()
    hook = block.attn.attn_drop.register_forward_hook(lambda part, args, out: seen.append(out[0]))
    behind = block(x[None], **({} if rope is None else {"rope": rope}))[0]
    hook.remove()
    block.attn.fused_attn, block.attn.attn_drop = True, drop
    return seen[0], behind


def blocks_of(encoder, image):
    """Of each block: tokens before it, attention, tokens behind it."""
    start = encoder._start(image[None])
    x = start.x[0]
    for layer, block in enumerate(encoder.vit.blocks):
        attention, behind = attention_of(block, x, start.inputs(layer).get("rope"))
        yield x, attention, behind
        x = behind


def read(encoder, relevance):
    """Rows that the answer is read from, for the patches."""
    patches = range(encoder.num_prefix, len(relevance))
    rows = [0] if encoder.vit.global_pool == "token" else patches
    return torch.stack([sum(relevance[row, patch] for row in rows) / len(rows) for patch in patches]).view(4, 4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rollout_equals_a_loop_over_images_and_rows(kind):
    encoder = build(kind)
    maps = rollout(encoder, IMAGES.double(), CLASSES)
    for image, found in zip(IMAGES.double(), maps, strict=True):
        reached = None
        for _, attention, _ in blocks_of(encoder, image):
            step = attention.mean(0) + torch.eye(attention.shape[1])
            step = torch.stack([row / row.sum() for row in step])
            reached = step if reached is None else step @ reached
        torch.testing.assert_close(found, read(encoder, reached).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["class token", "mean", "rotary"])
@torch.no_grad()
def test_token_tm_equals_a_loop_over_images_and_tokens(kind):
    encoder = build(kind)
    maps = token_tm(encoder, IMAGES.double(), CLASSES)
    for image, found in zip(IMAGES.double(), maps, strict=True):
        relevance = None
        for before, attention, behind in blocks_of(encoder, image):
            if relevance is None:
                relevance = torch.diag(before.norm(dim=1))
            cosines = [(b @ a) / (b.norm() * a.norm()) for b, a in zip(before, behind, strict=True)]
            total = sum(cosine.exp() for cosine in cosines) / len(cosines)
            added = torch.zeros_like(relevance)
            for row in range(len(before)):
                for token, cosine in enumerate(cosines):
                    weight = behind[token].norm() / before[token].norm() * cosine.exp() / total
                    added[row] += attention.mean(0)[row, token] * weight * relevance[token]
            relevance = relevance + added
        torch.testing.assert_close(found, read(encoder, relevance).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_grad_cam_equals_differences_of_scores(kind):
    """The gradient of each channel by central differences, patch by patch."""
    encoder = build(kind)
    (found,) = grad_cam(encoder, IMAGES[:1].double(), CLASSES[:1])
    with torch.no_grad():
        tokens = encoder.before_last_block(IMAGES[:1].double())
        x, prefix = tokens.x, encoder.num_prefix

        def score(moved):
            return encoder.vit.forward_head(encoder.last_block(tokens.with_x(moved)))[0, CLASSES[0]]

        weights = torch.zeros(32, dtype=torch.float64)
        for channel in range(0, 32):
            step = torch.zeros_like(x)
            step[:, prefix:, channel] = 1e-5  # all patches together: the sum of their gradients
            weights[channel] = (score(x + step) - score(x - step)) / 2e-5 / 16
        expected = torch.stack([(weights * token).sum().clamp(min=0) for token in x[0, prefix:]]).view(4, 4)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-5)
    assert found.max() > 0


@pytest.mark.parametrize("name", EXPLANATIONS)
def test_an_explanation_is_the_same_alone_and_in_a_batch_and_leaves_no_gradient(name):
    encoder = build()
    both = EXPLANATIONS[name](encoder, IMAGES.double(), CLASSES)
    alone = EXPLANATIONS[name](encoder, IMAGES[1:].double(), CLASSES[1:])
    torch.testing.assert_close(both[1:], alone)
    assert both.shape == (2, 4, 4)
    assert not both.requires_grad
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_grad_cam_follows_the_class_that_is_asked_for():
    encoder = build()
    one, other = (grad_cam(encoder, IMAGES.double(), torch.tensor(classes)) for classes in ([0, 0], [3, 3]))
    assert not torch.allclose(one, other)


def test_of_a_conv_net_grad_cam_weighs_the_last_map():
    torch.manual_seed(0)
    encoder = ConvEncoder("resnet10t", 64)
    encoder.vit.reset_classifier(4)
    encoder = encoder.eval()
    (found,) = grad_cam(encoder, torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), CLASSES[:1])
    with torch.no_grad():
        features = encoder.vit.forward_features(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        weights = encoder.vit.fc.weight[CLASSES[0]] / 4  # of the mean over 2 x 2 places
        expected = (weights[:, None, None] * features[0]).sum(0).clamp(min=0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["rollout", "tokentm"])
def test_attention_of_a_conv_net_is_refused(name):
    with pytest.raises(TypeError, match="ResNet has no attention"):
        EXPLANATIONS[name](ConvEncoder("resnet10t", 64), torch.randn(1, 3, 64, 64), CLASSES[:1])


def test_the_classifier_answers_as_timm_does():
    encoder = build()
    assert torch.equal(classify(encoder, IMAGES.double()), encoder.vit(IMAGES.double()))

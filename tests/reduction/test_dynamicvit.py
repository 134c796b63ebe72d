import pytest
import torch
import torch.nn.functional as F
from small_models import build

from mim.reduction import DynamicViT, TokenReducedViT, Tokens
from mim.reduction.attention import Attending
from mim.reduction.dynamicvit import Predictor


def wrapper(**settings):
    torch.manual_seed(3)
    return TokenReducedViT(build("plain"), DynamicViT(16, **{"keep": 0.6, "at": [0, 2], **settings}))


def test_a_predictor_judges_by_own_features_and_the_mean_of_those_left():
    predictor, patches = Predictor(16), torch.randn(2, 6, 16)
    alive = torch.tensor([[1.0, 1, 0, 1, 0, 1]] * 2)
    embedded = predictor.embed(patches)
    mean = embedded[:, alive[0] > 0, 8:].mean(1, keepdim=True).expand(-1, 6, -1)
    expected = predictor.decide(torch.cat([embedded[..., :8], mean], dim=2)).log_softmax(2)
    torch.testing.assert_close(predictor(patches, alive), expected)
    assert expected.exp().sum(2).allclose(torch.ones(()))


def test_in_evaluation_the_most_wanted_tokens_are_taken_along(images):
    model = wrapper().eval()
    assert model.reduction.counts(25, 4) == [15, 15, 9, 9]
    tokens = model.forward_tokens(images)
    assert (tokens.count, tokens.alive, tokens.auxiliary) == (9, None, ())
    x = model.vit.blocks[0](model.vit._pos_embed(model.vit.patch_embed(images)))
    wanted = model.reduction.predictors[0](x[:, 1:])[..., 0].topk(15).indices
    first = model.reduction.after_blocks([0], model.vit.blocks, model.vit._pos_embed(model.vit.patch_embed(images)), 1)[
        0
    ]
    for row in range(3):
        assert sorted(wanted[row].tolist()) == (first.assign[row] >= 0).nonzero()[:, 0].tolist()


def test_in_training_tokens_are_hidden_for_good(images):
    model = wrapper(keep=0.3).train()
    tokens = model.forward_tokens(images)
    assert tokens.count == 25
    assert set(tokens.alive.unique().tolist()) == {0.0, 1.0}
    first, last = model.reduction.after_blocks(
        [0, 3], model.vit.blocks, model.vit._pos_embed(model.vit.patch_embed(images)), 1
    )
    assert (last.alive <= first.alive).all()


def test_hiding_is_the_masked_softmax_of_the_paper():
    """exp(l) m / sum with m = keep bit + 1e-6, and 1 where a token looks at itself."""
    block, x = build("plain").blocks[0], torch.randn(1, 1 + 5, 16)
    alive = torch.tensor([[1.0, 0, 1, 0, 1]])
    tokens = Tokens(x, 1, None, torch.arange(5)[None], torch.arange(5)[None], alive=alive)
    ours = Attending(block, 1).half(x, **tokens.inputs(0))
    attn, normed = block.attn, block.norm1(x)
    q, k, v = attn.qkv(normed).view(1, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
    mask = F.pad(alive + 1e-6, (1, 0), value=1.0)[:, None, None].expand(1, 1, 6, 6).clone()
    mask[..., range(6), range(6)] = 1.0
    weight = (q @ k.transpose(2, 3) * attn.scale).exp() * mask
    weight = weight / weight.sum(-1, keepdim=True)
    expected = x + attn.proj((weight @ v).transpose(1, 2).reshape(1, 6, 16))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_squared_difference_to_the_wanted_share(images):
    model = wrapper(keep=0.6, weight=2.0).train()
    tokens, labels = model.forward_tokens(images), torch.tensor([0, 1, 2])
    second = tokens.alive.mean(1) - 0.36
    torch.testing.assert_close(tokens.auxiliary[1], second)
    expected = 2.0 * torch.stack([part.square().mean() for part in tokens.auxiliary]).mean()
    torch.testing.assert_close(model.auxiliary_loss(tokens, labels), expected)


@pytest.mark.parametrize("what", ["share", "task"])
def test_the_gradient_of_both_losses_reaches_every_predictor(images, what):
    model = wrapper().train()
    tokens, labels = model.forward_tokens(images), torch.tensor([0, 1, 2])
    loss = (
        model.auxiliary_loss(tokens, labels) if what == "share" else F.cross_entropy(model.forward_head(tokens), labels)
    )
    loss.backward()
    for predictor in model.reduction.predictors:
        assert all(parameter.grad.isfinite().all() for parameter in predictor.parameters())
        assert predictor.decide[0].weight.grad.abs().sum() > 0

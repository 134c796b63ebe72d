import torch
import torch.nn.functional as F
from small_models import build

from mim.reduction import EarlyExit, TokenReducedViT
from mim.reduction.masks import mask_cross_entropy


def wrapper(**settings):
    reduction = EarlyExit(**{"dim": 16, "num_classes": 4, "at": [0, 2], "keep": 0.6, "context": 1, **settings})
    torch.manual_seed(5)
    for parameter in reduction.parameters():
        torch.nn.init.normal_(parameter)
    return TokenReducedViT(build("plain"), reduction)


def after(model, images, *layers):
    x = model.vit._pos_embed(model.vit.patch_embed(images))
    return model.reduction.after_blocks(layers, model.vit.blocks, x, 1, (5, 5))


def context_of(logits, count):
    """The surest ``count`` of every answered class, in a loop."""
    sure, answer = logits.softmax(1).max(1)
    kept = set()
    for label in answer.unique().tolist():
        own = (answer == label).nonzero()[:, 0].tolist()
        kept |= set(sorted(own, key=lambda n: -sure[n].item())[:count])
    return kept, sure


def test_the_surest_leave_except_a_few_of_every_class(images):
    model = wrapper(context=2).eval()
    (first,) = after(model, images, 0)
    x = model.vit.blocks[0](model.vit._pos_embed(model.vit.patch_embed(images)))
    logits = model.reduction.heads[0](x[:, 1:])
    for row in range(3):
        kept, sure = context_of(logits[row], 2)
        order = sorted((n for n in range(25) if n not in kept), key=lambda n: sure[n].item())
        expected = sorted([*kept, *order[: 15 - len(kept)]])
        assert (first.assign[row] >= 0).nonzero()[:, 0].tolist() == expected
    torch.testing.assert_close(first.canvas, logits)


def test_those_surer_than_a_threshold_are_hidden(images):
    model = wrapper(threshold=0.9, context=1).eval()
    assert model.reduction.counts(25, 4) == [25] * 4
    first, last = after(model, images, 0, 3)
    x = model.vit.blocks[0](model.vit._pos_embed(model.vit.patch_embed(images)))
    for row in range(3):
        kept, sure = context_of(model.reduction.heads[0](x[row, 1:]), 1)
        expected = [n in kept or sure[n].item() <= 0.9 for n in range(25)]
        assert first.alive[row].tolist() == expected
        assert 0 < sum(expected) < 25
    assert not (last.alive & ~first.alive).any()


def test_two_stages_finalise_the_tokens_that_the_reference_does(images):
    """Among live tokens surer than the threshold all leave but the surest few of each class, stage by stage."""
    model = wrapper(threshold=0.4, context=2).eval()
    for head in model.reduction.heads:  # so that no two are equally sure
        head[1].weight.data *= 0.1
    first, second = after(model, images, 0, 2)
    for row in range(3):
        alive = [True] * 25
        for state, head in ((first, 0), (second, 1)):
            sure, answer = model.reduction.heads[head](state.patches[row]).softmax(1).max(1)
            leaving = [n for n in range(25) if alive[n] and sure[n] > 0.4]
            for label in {answer[n].item() for n in leaving}:
                own = sorted((n for n in leaving if answer[n] == label), key=lambda n: -sure[n].item())
                leaving = [n for n in leaving if n not in own[:2]]
            alive = [alive[n] and n not in leaving for n in range(25)]
            assert state.alive[row].tolist() == alive
        assert 0 < sum(alive) < 25


def test_answers_given_early_are_never_overwritten(images):
    for settings in ({}, {"threshold": 0.6}):
        model = wrapper(**settings).eval()
        first, last = after(model, images, 0, 3)
        early = first.gone
        assert early.any()
        assert torch.equal(last.canvas[early], first.canvas[early])
        answer = torch.randn(3, 4, 10, 10)
        final = last.answered(answer)
        for row, patch in last.gone.nonzero().tolist():
            y, x = 2 * (patch // 5), 2 * (patch % 5)
            assert final[row, :, y + 1, x].tolist() == last.canvas[row, patch].tolist()
        alive = F.interpolate(last.gone.float().view(3, 1, 5, 5), (10, 10)) == 0
        assert torch.equal(final[alive.expand_as(final)], answer[alive.expand_as(final)])


def test_without_early_answers_the_answer_stays(images):
    answer = torch.randn(3, 4, 5, 5)
    model = wrapper(keep=1.0).eval()
    (last,) = after(model, images, 3)
    assert last.answered(answer) is answer
    assert torch.equal(model(images), model.vit(images))


def test_heads_learn_from_masks(images):
    model, labels = wrapper().train(), torch.randint(-1, 4, (3, 40, 40))
    tokens = model.forward_tokens(images)
    loss = model.auxiliary_loss(tokens, labels)
    torch.testing.assert_close(loss, sum(mask_cross_entropy(canvas, (5, 5), labels) for canvas in tokens.auxiliary))
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.reduction.parameters())
    assert model.vit.blocks[0].attn.qkv.weight.grad is not None

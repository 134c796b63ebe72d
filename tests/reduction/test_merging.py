import pytest
import torch
import torch.nn.functional as F
from small_models import build

from mim.reduction import Counts, DominantContextual, PerBlock, Tokens, ToMe
from mim.reduction.attention import Attending
from mim.reduction.merging import merge_pairs


def slow_merge(x, keys, sizes, prefix, r, by_similarity=False):
    """Bipartite soft matching of one image in loops, with the parity of places in the whole sequence."""
    places = range(len(x))
    proposing = [n for n in places if (n + prefix) % 2 == 0]
    others = [n for n in places if (n + prefix) % 2 == 1]
    cosine = F.normalize(keys, dim=-1) @ F.normalize(keys, dim=-1).T
    partner = {a: max(others, key=lambda b, a=a: cosine[a, b].item()) for a in proposing}
    ranked = sorted(proposing, key=lambda a: -cosine[a, partner[a]].item())
    merged, alone = ranked[:r], ranked[r:] if by_similarity else sorted(ranked[r:])
    groups = [[n] for n in alone] + [[n, *(a for a in merged if partner[a] == n)] for n in others]
    out = torch.stack([sum(sizes[n] * x[n] for n in group) / sum(sizes[n] for n in group) for group in groups])
    return out, [sum(sizes[n] for n in group) for group in groups], groups


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("r", [1, 3, 4])
def test_pairs_are_those_of_a_slow_loop(prefix, r):
    x, keys = torch.randn(2, prefix + 9, 4), torch.randn(2, 9, 3)
    tokens = merge_pairs(Tokens.start(x, prefix), F.normalize(keys, dim=-1), r)
    for row in range(2):
        expected, sizes, groups = slow_merge(x[row, prefix:], keys[row], [1] * 9, prefix, r)
        torch.testing.assert_close(tokens.patches[row], expected)
        assert tokens.sizes[row].tolist() == sizes
        assert tokens.assign[row].tolist() == [next(i for i, g in enumerate(groups) if n in g) for n in range(9)]
    assert torch.equal(tokens.x[:, :prefix], x[:, :prefix])


def test_a_second_merge_weighs_by_size():
    x = torch.randn(1, 1 + 8, 4)
    once = merge_pairs(Tokens.start(x, 1), F.normalize(torch.randn(1, 8, 3), dim=-1), 3)
    keys = torch.randn(1, 5, 3)
    twice = merge_pairs(once, F.normalize(keys, dim=-1), 2)
    expected, sizes, _ = slow_merge(once.patches[0], keys[0], once.sizes[0].tolist(), 1, 2)
    torch.testing.assert_close(twice.patches[0], expected)
    assert twice.sizes[0].tolist() == sizes


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("reference_order", [False, True])
def test_the_reference_leaves_tokens_in_order_of_similarity_if_there_is_no_class_token(prefix, reference_order):
    block = build("plain").blocks[0]
    x = torch.randn(1, prefix + 12, 16)
    attending = Attending(block, prefix)
    middle = attending.half(x)
    keys = attending.mean_keys()[0]
    by_similarity = reference_order and not prefix
    reduction = ToMe(PerBlock(2), reference_order=reference_order)
    tokens = reduction.reduce(Tokens.start(middle, prefix), attending, 10, 0)
    expected, sizes, _ = slow_merge(middle[0, prefix:], keys, [1] * 12, prefix, 2, by_similarity)
    torch.testing.assert_close(tokens.patches[0], expected)
    assert tokens.sizes[0].tolist() == sizes


def test_tome_merges_between_attention_and_mlp_by_mean_keys():
    block = build("layer scale").blocks[0]
    x = torch.randn(1, 1 + 6, 16)
    attending = Attending(block, 1)
    middle = attending.half(x)
    keys = block.attn.qkv(block.norm1(x)).view(1, 7, 3, 2, 8)[0, 1:, 1].mean(1)
    expected, _, _ = slow_merge(middle[0, 1:], keys, [1] * 6, 1, 2)
    left = torch.cat([middle[0, :1], expected])[None]
    expected = left + block.drop_path2(block.ls2(block.mlp(block.norm2(left))))
    tokens = ToMe(PerBlock(2))(torch.nn.Sequential(block), x, 1)
    torch.testing.assert_close(tokens.x, expected, rtol=1e-5, atol=1e-5)


def test_restoring_a_piecewise_constant_image_is_exact():
    """Patches equal in pairs merge with their twin only, and come back in place."""
    values = torch.tensor([3.0, 3, 1, 1, 2, 2])
    x = torch.cat([torch.zeros(1), values])[None, :, None]
    keys = F.normalize(torch.nn.functional.one_hot(values.long()).float(), dim=-1)[None]
    tokens = merge_pairs(Tokens.start(x, 1), keys, 3)
    assert tokens.count == 3
    assert tokens.dense().flatten().tolist() == values.tolist()


def test_contextual_tokens_are_means_of_what_resembles_them():
    block = build("plain").blocks[0]
    x = torch.randn(2, 1 + 12, 16)
    attending = Attending(block, 1)
    middle = attending.half(x)
    attention, keys = attending.class_attention(), F.normalize(attending.mean_keys(), dim=-1)
    reduction = DominantContextual(Counts([6]), contextual=1 / 3)
    tokens = reduction.reduce(Tokens.start(middle, 1), attending, 6, 0)
    for row in range(2):
        order = attention[row].argsort(descending=True).tolist()
        dominant, rest = sorted(order[:4]), sorted(order[4:])
        targets = [rest[0], rest[4]]
        groups = [[n] for n in dominant] + [[n] for n in targets]
        for n in rest:
            if n not in targets:
                groups[4 + int((keys[row, targets] @ keys[row, n]).argmax())].append(n)
        expected = torch.stack([middle[row, [1 + n for n in group]].mean(0) for group in groups])
        torch.testing.assert_close(tokens.patches[row], expected)

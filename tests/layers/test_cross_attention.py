import pytest
import torch

from mim.layers.cross_attention import CrossAttention, CrossBlock
from mim.layers.initialisation import initialise


def test_attention_equals_a_slow_loop():
    attention = CrossAttention(8, 2, context_dim=6)
    queries, context = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    keys, values = attention.keys_values(context).chunk(2, dim=2)
    asked = attention.query(queries)
    expected = torch.zeros(2, 3, 8)
    for image in range(2):
        for place in range(3):
            for head in (slice(0, 4), slice(4, 8)):
                scores = torch.stack([asked[image, place, head] @ key[head] for key in keys[image]]) / 2
                shares = scores.softmax(0)
                expected[image, place, head] = sum(s * v[head] for s, v in zip(shares, values[image], strict=True))
    torch.testing.assert_close(attention(queries, context), attention.proj(expected))


def test_another_query_changes_nothing_for_the_others():
    block = CrossBlock(8, 2)
    queries, context = torch.randn(2, 4, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(block(queries, context)[:, :3], block(queries[:, :3], context))


def test_the_order_of_the_context_does_not_matter_but_what_is_in_it_does():
    block = CrossBlock(8, 2, context_dim=4)
    queries, context = torch.randn(1, 3, 8), torch.randn(1, 5, 4)
    torch.testing.assert_close(block(queries, context.flip(1)), block(queries, context))
    assert not torch.allclose(block(queries, context[:, 1:]), block(queries, context))


def test_every_parameter_gets_a_gradient():
    block = CrossBlock(8, 2, context_dim=4)
    initialise(block)
    block(torch.randn(2, 3, 8), torch.randn(2, 5, 4)).square().mean().backward()
    assert all(parameter.grad.any() for parameter in block.parameters())


def test_it_works_in_reduced_precision():
    with torch.autocast("cpu", torch.bfloat16):
        assert CrossBlock(8, 2)(torch.randn(2, 3, 8), torch.randn(2, 5, 8)).isfinite().all()


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_the_width_are_refused(heads):
    with pytest.raises(ValueError, match=f"cross-attention of width 8 cannot have {heads} heads"):
        CrossAttention(8, heads)

import pytest
import torch

from mim.layers.cross_attention import CrossAttention, CrossBlock, CrossDecoder, Mix
from mim.layers.initialisation import initialise
from mim.patches import gather_tokens


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


def test_every_block_of_the_decoder_sees_its_own_combination_of_layers():
    mix = Mix(6, layers=3, count=2)
    layers = [torch.randn(2, 5, 6) for _ in range(3)]
    for number, mixed in enumerate(mix(layers)):
        plain = sum(share * tokens for share, tokens in zip(mix.shares[number], layers, strict=True))
        torch.testing.assert_close(mixed, mix.norms[number](plain))
    assert mix.shares.shape == (2, 3)


def test_a_patch_is_predicted_alike_whatever_else_is_asked_for():
    decoder = CrossDecoder(6, (2, 3), out_dim=4, width=8, depth=2, heads=2)
    layers = [torch.randn(2, 5, 6)]
    everything = decoder(layers, torch.arange(6).expand(2, -1))
    some = torch.tensor([[4, 1], [0, 5]])
    torch.testing.assert_close(decoder(layers, some), gather_tokens(everything, some))
    assert "positions" not in decoder.state_dict()

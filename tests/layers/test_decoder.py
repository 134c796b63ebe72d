import pytest
import torch

from mim.layers.decoder import Decoder, FillMasked, decoder_shape
from mim.patches import gather_tokens, visible_indices


@pytest.fixture
def mask():
    return torch.tensor([[True, False, True, False, True, True], [False, True, True, True, True, False]])


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_fill_puts_every_token_in_its_place(mask, prefix):
    fill = FillMasked(8, (2, 3), prefix, 12)
    latent = torch.randn(2, prefix + 2, 8)
    filled = fill(latent, mask) - fill.positions
    projected = fill.project(latent)
    for image in range(2):
        tokens = iter(projected[image])
        for place, hidden in enumerate([False] * prefix + mask[image].tolist()):
            expected = fill.mask_token[0, 0] if hidden else next(tokens)
            torch.testing.assert_close(filled[image, place], expected)


def test_fill_works_in_reduced_precision(mask):
    with torch.autocast("cpu", torch.bfloat16):
        filled = FillMasked(8, (2, 3), 1, 12)(torch.randn(2, 3, 8), mask)
    assert filled.isfinite().all()


def test_positions_are_fixed_and_not_part_of_the_state():
    fill = FillMasked(8, (2, 3), 1, 12)
    assert "positions" not in fill.state_dict()
    assert not fill.positions.requires_grad


def test_predictions_for_some_patches_equal_those_for_all(mask):
    decoder = Decoder(8, (2, 3), 1, out_dim=5, width=12, depth=2, heads=3)
    latent, hidden = torch.randn(2, 3, 8), visible_indices(~mask)
    everything = decoder(latent, mask)
    assert everything.shape == (2, 6, 5)
    torch.testing.assert_close(decoder(latent, mask, hidden), gather_tokens(everything, hidden))


def test_the_decoder_looks_at_the_class_token(mask):
    decoder = Decoder(8, (2, 3), 1, out_dim=5, width=12, depth=1, heads=3)
    latent = torch.randn(2, 3, 8)
    other = latent.clone()
    other[:, 0] += 1
    assert not torch.allclose(decoder(latent, mask), decoder(other, mask))


@pytest.mark.parametrize(
    ("dim", "width", "heads"),
    [(1280, 512, 16), (1024, 512, 16), (768, 512, 16), (384, 256, 8), (192, 128, 4), (16, 32, 1)],
)
def test_a_decoder_left_open_is_the_papers_from_vit_base_on_and_in_proportion_below(dim, width, heads):
    assert decoder_shape(dim, None, 8, None) == {"width": width, "depth": 8, "heads": heads}


@pytest.mark.parametrize(("width", "heads"), [(512, 16), (100, 2), (30, 1), (112, 2)])
def test_heads_left_open_divide_any_width(width, heads):
    assert decoder_shape(384, width, 2, None) == {"width": width, "depth": 2, "heads": heads}


def test_a_decoder_that_is_named_is_as_it_is_named():
    assert decoder_shape(192, 512, 8, 16) == {"width": 512, "depth": 8, "heads": 16}

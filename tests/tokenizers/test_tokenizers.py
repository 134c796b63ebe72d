import pytest
import torch

from mim.errors import UserError
from mim.patches import patchify
from mim.randomness import keyed_generator
from mim.tokenizers import Codebook, ConvTokenizer, PatchTokenizer, load_tokenizer, save_tokenizer
from mim.tokenizers.fitting import fit, reconstruction


def built(kind=PatchTokenizer, **settings):
    torch.manual_seed(0)
    arguments = {"codes": 12, "stride": 4} | ({"width": 8, "dim": 6} if kind is ConvTokenizer else {}) | settings
    tokenizer = kind(**arguments)
    tokenizer.start(torch.rand(2, 3, 16, 24), keyed_generator(0))
    return tokenizer


kinds = pytest.mark.parametrize("kind", [PatchTokenizer, ConvTokenizer])


def test_the_nearest_code_is_that_of_a_slow_loop():
    book = Codebook(7, 5)
    book.codes.copy_(torch.randn(7, 5))
    vectors = torch.randn(2, 3, 5)
    slow = [[min(range(7), key=lambda v: (book.codes[v] - x).norm().item()) for x in row] for row in vectors]
    assert book.nearest(vectors).tolist() == slow


@kinds
def test_what_is_not_finite_has_no_id(kind):
    tokenizer, images = built(kind), torch.rand(2, 3, 16, 16)
    images[0, 0, 0, 0] = torch.nan
    ids = tokenizer.encode(images)
    assert ids[0, 0, 0] == -1
    assert (ids[1] >= 0).all()
    tokenizer.codebook.codes[3] = torch.inf
    assert (tokenizer.encode(images) == -1).all()


def test_a_file_that_holds_nan_is_refused(tmp_path):
    tokenizer = built()
    tokenizer.codebook.codes[0, 0] = torch.nan
    save_tokenizer(tokenizer, tmp_path / "t.safetensors")
    with pytest.raises(UserError, match="is no tokenizer"):
        load_tokenizer(str(tmp_path / "t.safetensors"))


def test_codes_move_to_the_means_of_their_vectors_and_unused_ones_start_again():
    book = Codebook(3, 1)
    book.codes.copy_(torch.tensor([[0.0], [10.0], [500.0]]))
    vectors = torch.tensor([[-1.0], [1.0], [9.0], [11.0]])
    for step in range(300):
        book.update(vectors, book.nearest(vectors), keyed_generator(0, step))
    assert book.nearest(vectors).unique().numel() == 3
    assert book.codes.abs().max() < 12


@kinds
@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_ids_are_a_grid_and_images_come_back_in_their_size(kind, size):
    tokenizer, images = built(kind), torch.rand(2, 3, *size)
    ids = tokenizer.encode(images)
    assert ids.shape == (2, size[0] // 4, size[1] // 4)
    assert tokenizer.decode(ids).shape == tokenizer.mosaic(ids).shape == images.shape


def test_ids_of_patches_come_back_from_their_images_of_8_bit():
    tokenizer = built()
    ids = torch.randint(12, (3, 4, 4))
    assert torch.equal(tokenizer.encode(tokenizer.decode(ids).mul(255).round() / 255), ids)


@kinds
def test_a_token_of_a_mosaic_tells_of_itself_alone(kind):
    tokenizer, ids = built(kind), torch.randint(12, (1, 3, 3))
    other = ids.clone()
    other[0, 1, 1] = (ids[0, 1, 1] + 1) % 12
    before, after = (patchify(tokenizer.mosaic(grid), 4)[0] for grid in (ids, other))
    changed = (before != after).any(1).tolist()
    assert [place for place, moved in enumerate(changed) if moved] == [4]


@kinds
def test_a_file_gives_the_same_tokenizer_again(kind, tmp_path):
    tokenizer, images = built(kind), torch.rand(1, 3, 16, 16)
    save_tokenizer(tokenizer, tmp_path / "t.safetensors")
    again = load_tokenizer(str(tmp_path / "t.safetensors"))
    assert torch.equal(again.encode(images), tokenizer.encode(images))
    assert not any(parameter.requires_grad for parameter in again.parameters())


@kinds
def test_fitting_lowers_the_error_and_is_a_function_of_the_seed(kind):
    images = torch.rand(4, 3, 1, 1) * torch.ones(1, 1, 16, 16) + 0.1 * torch.rand(4, 3, 16, 16)
    codes = []
    for _ in range(2):
        tokenizer = built(kind)
        losses = [loss for _, loss in fit(tokenizer, iter([images] * 40), 40, 3e-3, 0)]
        codes.append(tokenizer.codebook.codes)
    assert losses[-1] < losses[0]
    assert torch.equal(*codes)


def test_gradients_pass_the_codebook_straight_through():
    tokenizer = built(ConvTokenizer)
    tokenizer.fit_loss(torch.rand(1, 3, 16, 16), keyed_generator(0)).backward()
    assert all(parameter.grad.any() for parameter in tokenizer.parameters())


def test_codes_that_are_the_patches_lose_nothing():
    tokenizer = PatchTokenizer(16, 4)
    images = torch.rand(1, 3, 16, 16)
    tokenizer.start(images, keyed_generator(0))
    decibel, used = reconstruction(tokenizer, images)
    assert decibel > 60
    assert used == 16


def test_the_built_in_tokenizer_has_256_patches_of_4_px():
    tokenizer = load_tokenizer("builtin")
    assert (tokenizer.kind, tokenizer.codes, tokenizer.stride) == ("patches", 256, 4)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"\xff" * 64])
def test_a_file_that_is_none_is_refused_by_name(content, tmp_path):
    if content is not None:
        (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"--tokenizer .*t\.safetensors"):
        load_tokenizer(str(tmp_path / "t.safetensors"))


def test_a_stride_that_convolutions_of_stride_2_do_not_reach_is_refused():
    with pytest.raises(ValueError, match="no power of 2"):
        ConvTokenizer(stride=6)


@kinds
def test_a_frozen_tokenizer_draws_its_codes_once_and_anew_for_other_weights(kind, monkeypatch):
    tokenizer, other, ids = built(kind).freeze(), built(kind), torch.arange(12).view(1, 3, 4)
    torch.nn.init.normal_(other.codebook.codes)
    before = tokenizer.mosaic(ids)
    tiles, drawn = kind.tiles, []
    monkeypatch.setattr(kind, "tiles", lambda self: drawn.append(0) or tiles(self))
    assert torch.equal(tokenizer.mosaic(ids), before)
    assert drawn == []
    tokenizer.load_state_dict(other.state_dict())
    assert torch.equal(tokenizer.mosaic(ids), other.mosaic(ids))

import pytest
import torch

from mim.encoder import Encoder
from mim.errors import UserError
from mim.masking import GridMasking, RandomMasking
from mim.methods import MAE
from mim.randomness import RowGenerator
from mim.targets import PixelTarget


def squares_of(mask, grid, cell):
    """``(B, squares, cell * cell)``."""
    rows, columns = grid[0] // cell, grid[1] // cell
    return mask.view(-1, rows, cell, columns, cell).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)


@pytest.mark.parametrize(("grid", "cell"), [((4, 4), 2), ((6, 4), 2), ((6, 9), 3), ((14, 14), 2), ((4, 4), 4)])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_squares_are_hidden_whole_and_equally_many_of_every_image(grid, cell, ratio):
    policy = GridMasking(ratio, cell)
    patches = grid[0] * grid[1]
    if int(patches / cell**2 * (1 - ratio)) == 0:
        with pytest.raises(UserError, match="hides all 1 patches"):
            policy(3, grid)
        return
    mask = policy(3, grid)
    assert (~mask).sum(1).tolist() == [policy.visible_count(patches)] * 3
    assert policy.visible_count(patches) == int(patches // cell**2 * (1 - ratio)) * cell**2
    squares = squares_of(mask, grid, cell)
    assert torch.equal(squares.all(2), squares.any(2))


def test_squares_of_one_patch_are_random_masking():
    rows = [RowGenerator.for_rows(1, 0, 5) for _ in range(2)]
    ours, plain = (
        policy(5, (4, 6), generator=own)
        for policy, own in zip((GridMasking(0.6, 1), RandomMasking(0.6)), rows, strict=True)
    )
    assert torch.equal(ours, plain)


def test_every_square_is_hidden_equally_often():
    mask = GridMasking(0.75, 2)(4000, (8, 8))
    share = squares_of(mask, (8, 8), 2)[..., 0].float().mean(0)
    assert share.sub(0.75).abs().max() < 0.04


@pytest.mark.parametrize(("grid", "cell"), [((5, 4), 2), ((4, 7), 2), ((2, 18), 4)])
def test_a_grid_that_does_not_divide_is_refused(grid, cell):
    with pytest.raises(ValueError, match="squares of"):
        GridMasking(0.5, cell)(2, grid)


def test_a_square_without_patches_is_refused():
    with pytest.raises(ValueError, match="cell 0"):
        GridMasking(0.5, 0)


def test_mae_trains_with_it():
    encoder = Encoder("vit_tiny_patch16_224", 32, 8, kwargs={"embed_dim": 16, "depth": 1, "num_heads": 2}, registers=2)
    method = MAE(encoder, GridMasking(0.75, 2), PixelTarget(), 16, 1, 2)
    method.log = lambda *_, **__: None
    method.training_step(([torch.randn(2, 3, 32, 32)], torch.zeros(2)), 0).backward()
    assert encoder.vit.reg_token.grad.any()


@pytest.mark.parametrize(
    ("grid", "cell"),
    [
        ((14, 14), 2),  # 224 px in patches of 16: squares of 32 px
        ((28, 28), 4),  # patches of 8
        ((7, 7), 1),  # patches of 32
        ((16, 16), 2),  # 224 px in patches of 14: squares of 28 px
        ((56, 56), 8),
        ((8, 8), 1),  # 32 px in patches of 4
        ((4, 4), 1),
        ((6, 6), 1),
        ((14, 28), 2),
        ((5, 7), 1),
    ],
)
def test_squares_left_open_are_a_seventh_of_the_image_whatever_the_patch_size(grid, cell):
    policy = GridMasking(0.6, None)
    policy.fit(grid)
    assert policy.cell == cell
    assert policy(2, grid).sum(1).tolist() == [policy.most_hidden(grid[0] * grid[1])] * 2


def test_squares_left_open_are_settled_by_the_method():
    encoder = Encoder("vit_tiny_patch16_224", 224, 16, kwargs={"embed_dim": 16, "depth": 1, "num_heads": 2})
    method = MAE(encoder, GridMasking(0.6, None), decoder_width=16, decoder_depth=1, decoder_heads=2)
    assert method.masking.cell == 2
    assert method.visible_count == 76  # 19 of 49 squares


def test_squares_left_open_without_a_grid_are_refused():
    with pytest.raises(ValueError, match="left open"):
        GridMasking(0.6, None)(2, (4, 4))


@pytest.mark.parametrize(("grid", "cell"), [((1, 3), None), ((4, 4), 4), ((2, 4), 2)])
def test_fewer_than_four_squares_are_refused(grid, cell):
    with pytest.raises(ValueError, match="fewer than 4"):
        GridMasking(0.6, cell).fit(grid)

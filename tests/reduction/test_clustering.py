import pytest
import torch
import torch.nn.functional as F
from small_models import build

from mim.encoder import Encoder
from mim.reduction import GridClustering, KeepRate, TokenReducedViT
from mim.reduction.clustering import cells, neighbourhood, pooling


@pytest.mark.parametrize(("grid", "shape"), [((6, 6), (3, 3)), ((5, 7), (2, 3)), ((5, 5), (4, 1))])
def test_pooling_is_adaptive_average_pooling(grid, shape):
    image = torch.randn(1, 1, *grid)
    expected = F.adaptive_avg_pool2d(image, shape).flatten()
    torch.testing.assert_close(pooling(grid, shape, image.device) @ image.flatten(), expected)


def test_a_patch_may_join_the_cells_around_its_own():
    near = neighbourhood((4, 4), (2, 2), 1, torch.device("cpu")).view(4, 4, 2, 2)
    assert near.sum(dim=(2, 3)).eq(1).all()
    assert near[3, 0].tolist() == [[False, False], [True, False]]
    assert neighbourhood((4, 4), (2, 2), 3, torch.device("cpu")).all()


def test_cells_keep_the_proportions_of_the_grid():
    assert cells((14, 14), 98) == (10, 10)
    assert cells((4, 16), 16) == (2, 8)
    assert cells((5, 5), 1) == (1, 1)


def clustered(x, **settings):
    blocks = build("plain").blocks[:2]
    for parameter in blocks.parameters():
        torch.nn.init.zeros_(parameter)
    return GridClustering(KeepRate(0.25, at=[0]), **settings)(blocks, x, 1, (6, 6))


def test_weights_sum_to_one_so_that_a_constant_comes_back():
    tokens = clustered(torch.full((2, 37, 16), 3.0))
    assert tokens.count == 9
    torch.testing.assert_close(tokens.blend.sum(2), torch.ones(2, 36))
    torch.testing.assert_close(tokens.dense(), torch.full((2, 36, 16), 3.0))


def test_flat_regions_are_found_and_rebuilt():
    corners = torch.tensor([[0.0, 0, 0, 5, 5, 5]] * 3 + [[9.0, 9, 9, 2, 2, 2]] * 3).flatten()
    x = torch.cat([torch.zeros(1), corners])[None, :, None].expand(1, 37, 16)
    dense = clustered(x, tau=1.0).dense()
    torch.testing.assert_close(dense, x[:, 1:], rtol=1e-3, atol=1e-3)


def test_every_patch_is_rebuilt_from_a_few_clusters():
    blend = clustered(torch.randn(2, 37, 16), neighbours=3).blend
    assert (blend > 0).sum(2).unique().tolist() == [3]


def test_clusters_form_once_and_stay():
    reduction = GridClustering(KeepRate(0.5))
    assert reduction.counts(36, 8, (6, 6)) == [36, 36, *[16] * 6]


def test_clusters_cannot_follow_a_mask():
    kwargs = {"embed_dim": 16, "depth": 4, "num_heads": 2}
    encoder = Encoder("vit_tiny_patch16_224", 32, 8, kwargs=kwargs, reduction=GridClustering(KeepRate(0.5)))
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[:, :8] = True
    with pytest.raises(ValueError, match="grid of all patches"):
        encoder(torch.randn(1, 3, 32, 32), mask)


def test_the_wrapper_gives_dense_features_at_full_resolution():
    vit = build("plain")
    dense = TokenReducedViT(vit, GridClustering(KeepRate(0.5))).forward_dense(torch.randn(2, 3, 40, 40))
    assert dense.shape == (2, 16, 5, 5)

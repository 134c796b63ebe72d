"""Whether scores find what matters: images of noise in which 4 of 64 patches show the class."""

import pytest
import timm
import torch
import torch.nn.functional as F

from mim.reduction import ClassAttention, KeepRate, RandomScore, ReceivedAttention, TokenReducedViT, TopKPruning

SIGNS = torch.randn(8, 48, generator=torch.Generator().manual_seed(1))  # of the classes, 4 x 4 pixels each


def planted(count, generator):
    """Images ``(B, 3, 32, 32)``, their classes, and the patches ``(B, 4)`` that show them."""
    labels = torch.randint(len(SIGNS), (count,), generator=generator)
    places = torch.rand(count, 64, generator=generator).topk(4).indices
    patches = torch.randn(count, 64, 48, generator=generator)
    patches = patches.scatter(1, places[..., None].expand(-1, -1, 48), 2 * SIGNS[labels][:, None].expand(-1, 4, -1))
    return patches.view(count, 8, 8, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(count, 3, 32, 32), labels, places


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": len(SIGNS)}
    vit, generator = timm.create_model("vit_tiny_patch16_224", **size), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=3e-3)
    for _ in range(60):
        images, labels, _ = planted(32, generator)
        optimizer.zero_grad()
        F.cross_entropy(vit(images), labels).backward()
        optimizer.step()
    return vit.eval()


def recall(vit, score, keep, **settings):
    """Share of the planted patches that are left after two prunings."""
    images, _, places = planted(128, torch.Generator().manual_seed(3))
    with torch.no_grad():
        tokens = TokenReducedViT(vit, TopKPruning(KeepRate(keep, at=[1, 2]), score, **settings)).forward_tokens(images)
    return (~tokens.gone).gather(1, places).float().mean().item()


@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_attention_keeps_twice_as_many_planted_patches_as_chance(trained, keep):
    chance = recall(trained, RandomScore(), keep)
    assert chance == pytest.approx(keep**2, abs=0.06)
    assert recall(trained, ClassAttention(), keep) > 2 * chance
    assert recall(trained, ClassAttention(), keep, fuse=True) > 2 * chance
    assert recall(trained, ReceivedAttention(), keep) > 2 * chance

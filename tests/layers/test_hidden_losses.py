import pytest
import torch
import torch.nn.functional as F

from mim.layers import distillation
from mim.layers.distillation import STUDENT_TEMPERATURE, hidden_losses


@pytest.mark.parametrize("chunk", [3, 7, 100])
def test_losses_of_chunks_and_their_gradients_are_those_of_all_patches_at_once(chunk, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    points, prototypes, taught = (torch.randn(rows, 5, generator=generator) for rows in (7, 11, 7))
    points.requires_grad_()
    prototypes.requires_grad_()
    weight = torch.tensor([0.5, 0, 1, 0.25, 0, 2, 1])

    def soften(points):
        return (points @ prototypes.detach().T / 0.07).softmax(dim=1)

    total, entropy = hidden_losses(points, prototypes, taught, soften, weight)
    gradients = torch.autograd.grad(total / 3, (points, prototypes))
    logits, targets = points @ prototypes.T / STUDENT_TEMPERATURE, soften(taught)
    expected = (weight * F.cross_entropy(logits, targets, reduction="none")).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(entropy, (weight * -(targets * targets.clamp(min=1e-38).log()).sum(1)).sum())
    assert not entropy.requires_grad
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected / 3, (points, prototypes)), strict=True):
        torch.testing.assert_close(gradient, wanted)
    assert gradients[0][1].abs().max() == 0  # without weight

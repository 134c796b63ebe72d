"""What is said of the two families of ViTs without building them."""

import pytest
import timm
import torch

from mim.vit import without_weights


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_a_model_without_weights_has_the_shapes_and_settings_of_the_real_one_and_no_storage(name):
    with without_weights():
        skeleton = timm.create_model(name, depth=1)
    model = timm.create_model(name, depth=1)
    shapes = [{key: (part.shape, part.requires_grad) for key, part in m.named_parameters()} for m in (skeleton, model)]
    assert shapes[0] == shapes[1]
    assert all(part.is_meta for part in skeleton.state_dict().values())


def test_only_tensors_without_storage_are_left_unfilled():
    real = torch.zeros(2)
    with without_weights():
        real.add_(1)
    assert real.tolist() == [1, 1]

from typing import Any

import pytest
import timm
import torch
from torch import nn

from mim.conv_encoder import ConvEncoder
from mim.encoder import Encoder
from mim.errors import UserError
from mim.evaluation.features import Features, evaluating, pooled_features
from mim.layers.visible import enlarged

V2: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
NETS: list[tuple[str, dict[str, Any]]] = [("test_resnet", {}), ("test_convnext", {}), ("convnextv2_atto", V2)]
MASK = torch.tensor([[True, False, False, True], [False, True, True, False]])


def encoder(model: str, kwargs: dict[str, Any]) -> ConvEncoder:
    built = ConvEncoder(model, img_size=64, kwargs=kwargs)
    for layer in built.modules():  # such as scales that start at 0
        if "GlobalResponseNorm" in type(layer).__name__ and hasattr(layer, "weight"):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return built


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("model", "kwargs"), NETS)
def test_hidden_pixels_change_nothing_and_hidden_places_are_zero(
    model: str, kwargs: dict[str, Any], training: bool
) -> None:
    net, images = encoder(model, kwargs).train(training), torch.randn(2, 3, 64, 64)
    hidden = enlarged(MASK.view(2, 1, 2, 2), (64, 64))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    seen = net.stages(images, MASK)
    net.load_state_dict(state)
    for one, other in zip(seen, net.stages(images.masked_fill(hidden, torch.nan), MASK), strict=True):
        assert torch.equal(one, other)
        assert not one[enlarged(MASK.view(2, 1, 2, 2), (one.shape[2], one.shape[3])).expand_as(one)].any()
        assert one.any()


@pytest.mark.parametrize(("model", "kwargs"), NETS)
def test_with_nothing_hidden_it_is_timms_net(model: str, kwargs: dict[str, Any]) -> None:
    net, images = encoder(model, kwargs), torch.randn(2, 3, 64, 96)
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    for training in (False, True):
        net.train(training)
        for one, other in zip(net.stages(images, nothing), net.stages(images), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5 * training, atol=1e-5 * training)


@pytest.mark.parametrize(("model", "kwargs"), NETS)
def test_probes_get_what_timm_pools_and_places_where_they_lie(model: str, kwargs: dict[str, Any]) -> None:
    net, images = encoder(model, kwargs).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad(), evaluating(net):
        shared: Any = net
        pooled = pooled_features(shared, images, "mean")
        vectors, places = Features(pool="mean").with_patches(shared, images)
        torch.testing.assert_close(pooled, net.vit(images), rtol=0, atol=1e-6)
        torch.testing.assert_close(vectors, net.vit(images), rtol=0, atol=1e-6)
        assert torch.equal(places.permute(0, 3, 1, 2), net.feature_map(images))
    assert net.dim == vectors.shape[1] == timm.create_model(model, num_classes=0, **kwargs).num_features


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("test_vit", "neither a ResNet nor a ConvNeXt"),
        ("seresnet18", "SEModule"),
        ("resnetblur50", "BlurPool2d"),
        ("resnet18x", "no such model"),
    ],
)
def test_what_cannot_be_masked_is_refused_by_name(model: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ConvEncoder(model)


def test_an_image_that_does_not_divide_into_places_is_refused_with_one_that_does() -> None:
    with pytest.raises(UserError, match="--img_size 96"):
        ConvEncoder("test_resnet", img_size=100)


def test_other_methods_refuse_conv_nets_by_name() -> None:
    with pytest.raises(UserError, match="--model resnet18 is neither a plain nor a rotary ViT"):
        Encoder("resnet18")

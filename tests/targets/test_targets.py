import pytest
import timm
import torch
import torch.nn.functional as F

from mim.encoder import Encoder
from mim.errors import UserError
from mim.interop import ModelCard, export_backbone
from mim.patches import patchify, pixel_targets
from mim.targets import FeatureTarget, PixelTarget

GRID, INDICES = (4, 4), torch.tensor([[0, 5, 15], [3, 2, 9]])


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize(("standardise", "expected"), [(False, patchify), (True, pixel_targets)])
def test_pixels_are_those_of_the_patches_named(images, standardise, expected):
    target = PixelTarget(standardise)
    assert torch.equal(target(images, GRID, INDICES), expected(images, 8, INDICES))
    assert target.dim(Encoder("test_vit", 32, 8)) == 192


def test_patches_need_not_be_square(images):
    assert torch.equal(PixelTarget()(images, (2, 4), INDICES % 8), patchify(images, (16, 8), INDICES % 8))


def test_the_error_of_pixels_is_their_mean_squared_difference():
    prediction, target = torch.randn(2, 3, 5, dtype=torch.bfloat16), torch.randn(2, 3, 5)
    error = PixelTarget().error(prediction, target)
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, (prediction.float() - target).square().mean(-1))


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]).expand(2, 3, 5)])
def test_the_absolute_error_of_pixels_is_the_mean_of_differences(weights):
    prediction, target = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    expected = (prediction - target).abs()[..., slice(None) if weights is None else [0, 2, 3]].mean(-1)
    absolute = PixelTarget(distance="absolute")
    torch.testing.assert_close(absolute.error(prediction, target, weights), expected)
    torch.testing.assert_close(absolute.loss(prediction, target, weights), expected.mean())


def test_a_distance_that_is_none_is_refused():
    with pytest.raises(ValueError, match="distance cubed is none of squared, absolute"):
        PixelTarget(distance="cubed")


@pytest.mark.parametrize("standardise", [False, True])
def test_a_perfect_prediction_is_shown_as_the_image(images, standardise):
    target = PixelTarget(standardise)
    shown = target.to_pixels(target(images, GRID, INDICES), images, GRID, INDICES)
    torch.testing.assert_close(shown, patchify(images, 8, INDICES), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained ViT with registers, patches of 4 pixels, and pixels normalised by 0.5 and 0.25."""
    torch.manual_seed(0)
    kwargs = {"patch_size": 4, "img_size": 16, "num_classes": 0, "reg_tokens": 2, "embed_dim": 24, "num_heads": 2}
    vit = timm.create_model("test_vit", **kwargs)
    torch.nn.init.normal_(vit.pos_embed)
    path = tmp_path_factory.mktemp("teacher") / "backbone"
    statistics = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    export_backbone(vit, path, **statistics, card=ModelCard("none", "none"), model_args={"num_heads": 2})
    return path


def test_features_are_those_of_the_frozen_vit_at_the_same_places(images, folder):
    target = FeatureTarget(f"local-dir:{folder}", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    assert target.dim(Encoder("test_vit", 32, 8)) == 24
    pixels = images * torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1) + torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    smaller = F.interpolate((pixels - 0.5) / 0.25, (16, 16), mode="bicubic", antialias=True)
    twin = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    tokens = F.normalize(twin.forward_features(smaller)[:, twin.num_prefix_tokens :], dim=-1)
    expected = torch.stack([tokens[0, INDICES[0]], tokens[1, INDICES[1]]])
    torch.testing.assert_close(target(images, GRID, INDICES), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A ViT with CLIP's parts: a norm before the blocks, one behind them, and a projection."""
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "img_size": 32, "num_classes": 6, "depth": 1, "pre_norm": True}
    vit = timm.create_model("test_vit", **kwargs).eval()
    torch.nn.init.normal_(vit.head.weight)
    path = tmp_path_factory.mktemp("clip") / "backbone"
    statistics = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    export_backbone(vit, path, **statistics, card=ModelCard("none", "none"), model_args={"pre_norm": True})
    return vit, f"local-dir:{path}"


def test_a_projected_target_is_the_head_of_every_normed_token(images, clip):
    vit, name = clip
    target = FeatureTarget(name, projection=True, own_normalisation=False)
    assert target.dim(Encoder("test_vit", 32, 8)) == 6
    tokens = vit.forward_features(images)[:, 1:] @ vit.head.weight.T + vit.head.bias
    expected = torch.stack([tokens[0, INDICES[0]], tokens[1, INDICES[1]]])
    torch.testing.assert_close(target(images, GRID, INDICES), F.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)


def test_a_model_without_a_head_has_no_projection(folder):
    with pytest.raises(UserError, match="has no linear head"):
        FeatureTarget(f"local-dir:{folder}", projection=True)


def test_a_run_that_normalises_in_another_way_is_refused_with_the_options_to_copy(folder):
    target = FeatureTarget(f"local-dir:{folder}", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    target.check([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    with pytest.raises(UserError, match="normalised in another way") as mistake:
        target.check([0.1, 0.5, 0.6], [0.2, 0.3, 0.4])
    assert "target.init_args.mean [0.1,0.5,0.6]" in str(mistake.value)


def test_a_grid_of_another_size_and_shape_resizes_positions(folder):
    features = FeatureTarget(f"local-dir:{folder}")(torch.randn(2, 3, 32, 64), (4, 8), INDICES * 2)
    assert features.shape == (2, 3, 24)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 3))


def test_the_frozen_vit_never_trains(images, folder):
    target = FeatureTarget(f"local-dir:{folder}").train()
    assert target.training
    assert not target.encoder.training
    assert not any(p.requires_grad for p in target.parameters())
    assert not target(images.requires_grad_(), GRID, INDICES).requires_grad


def test_the_error_of_features_is_twice_one_minus_the_cosine(folder):
    target = FeatureTarget(f"local-dir:{folder}")
    prediction, wanted = torch.randn(2, 3, 24), F.normalize(torch.randn(2, 3, 24), dim=-1)
    cosine = F.cosine_similarity(prediction, wanted, dim=-1)
    torch.testing.assert_close(target.error(prediction, wanted), 2 - 2 * cosine)
    torch.testing.assert_close(target.error(7 * wanted, wanted), torch.zeros(2, 3))


def test_smooth_features_are_standardised_and_their_error_grows_straight_from_one_on(images, folder):
    target = FeatureTarget(f"local-dir:{folder}", distance="smooth")
    values = target(images, GRID, INDICES)
    torch.testing.assert_close(values.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.var(-1, unbiased=False), torch.ones(2, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(target.error(values + 0.5, values), torch.full((2, 3), 0.125))
    torch.testing.assert_close(target.error(values + 3, values), torch.full((2, 3), 2.5))
    with pytest.raises(ValueError, match="distance cubed"):
        FeatureTarget(f"local-dir:{folder}", distance="cubed")


def test_features_show_no_pixels(images, folder):
    assert FeatureTarget(f"local-dir:{folder}").to_pixels(torch.randn(2, 3, 24), images, GRID, INDICES) is None


def test_other_channels_than_the_frozen_vit_takes_are_refused(folder):
    with pytest.raises(ValueError, match="takes 3 channels, images have 5"):
        FeatureTarget(f"local-dir:{folder}").dim(Encoder("test_vit", 32, 8, in_chans=5))


def test_a_frozen_vit_that_cannot_be_had_is_named_by_its_own_option(monkeypatch):
    with pytest.raises(UserError) as mistake:
        FeatureTarget("vit_smal_patch16_224")
    assert mistake.value.error.startswith("--model.init_args.target.init_args.model vit_smal_patch16_224: timm")
    assert mistake.value.hint.startswith("--model.init_args.target.init_args.model vit_small_patch16_224")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    with pytest.raises(UserError, match="timm could not get its pretrained weights") as mistake:
        FeatureTarget("vit_tiny_patch16_224")
    assert mistake.value.why == "Name or service not known"


def no_network(*_, **__):
    raise ConnectionError("Name or service not known")


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_pixels_standardised_by_channel_do_not_know_the_levels_of_channels_and_come_back_as_pixels(channels):
    """With nodata, too: what it is filled with says nothing."""
    images, grid = torch.randn(2, channels, 16, 16), (2, 2)
    gains, levels = torch.rand(2, channels, 1, 1) + 0.5, 5 * torch.randn(2, channels, 1, 1)
    indices = torch.tensor([[0, 3], [1, 2]])
    valid = torch.rand(2, 1, 16, 16) > 0.2
    target = PixelTarget(standardise="channel")
    found, _ = target.measured(images, grid, indices, None)
    assert found.shape == (2, 2, 64 * channels)
    torch.testing.assert_close(found, target.measured(images * gains + levels, grid, indices, None)[0])
    by_channel = found.unflatten(-1, (64, channels))
    torch.testing.assert_close(by_channel.mean(-2), torch.zeros(2, 2, channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_channel.std(-2), torch.ones(2, 2, channels))
    torch.testing.assert_close(
        target.to_pixels(found, images, grid, indices), patchify(images, (8, 8), indices), atol=1e-5, rtol=1e-5
    )
    one, weights = target.measured(images.where(valid, 0.0), grid, indices, valid)
    other, _ = target.measured(images.where(valid, 9.0), grid, indices, valid)
    torch.testing.assert_close(one * weights, other * weights)

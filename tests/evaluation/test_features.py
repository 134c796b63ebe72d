import weakref

import pytest
import torch

from mim.encoder import Encoder
from mim.evaluation import extract, pooled_features
from mim.reduction import PerBlock, ToMe


@pytest.fixture
def encoder():
    return Encoder("test_vit", img_size=32, kwargs={"reg_tokens": 2})


def batches(count=3, rows=4, size=32):
    return [(torch.randn(rows, 3, size, size), torch.arange(rows) + rows * i) for i in range(count)]


def test_cls_is_timms_class_token_after_the_norm(encoder):
    images = torch.randn(2, 3, 32, 32)
    expected = encoder.vit.eval().forward_features(images)[:, 0]
    torch.testing.assert_close(pooled_features(encoder.eval(), images, "cls"), expected)


def test_mean_takes_the_patches_and_no_register(encoder):
    images = torch.randn(2, 3, 32, 32)
    expected = encoder.vit.eval().forward_features(images)[:, 3:].mean(1)
    torch.testing.assert_close(pooled_features(encoder.eval(), images, "mean"), expected)


def test_mean_counts_merged_patches_by_their_size(encoder):
    encoder.reduction = ToMe(PerBlock(1))
    tokens = encoder.eval().forward_tokens(torch.randn(2, 3, 32, 32))
    assert tokens.sizes.amax() > 1
    torch.testing.assert_close(tokens.patch_mean(), tokens.dense().mean(1))


def test_mean_of_a_mean_pooling_model_is_its_own_output():
    encoder = Encoder("test_vit", img_size=32, kwargs={"class_token": False, "global_pool": "avg"}).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(pooled_features(encoder, images, "mean"), encoder.vit(images))


def test_model_without_a_class_token_has_no_cls_even_with_registers():
    encoder = Encoder("test_vit", img_size=32, kwargs={"class_token": False, "reg_tokens": 2, "global_pool": "avg"})
    assert pooled_features(encoder, torch.randn(1, 3, 32, 32), "mean").shape == (1, encoder.dim)
    with pytest.raises(ValueError, match="no class token"):
        pooled_features(encoder, torch.randn(1, 3, 32, 32), "cls")


def test_extract_keeps_the_order_and_every_image(encoder):
    given = batches()
    features, labels = extract(encoder, given)
    one_by_one = torch.cat(
        [pooled_features(encoder.eval(), images[i : i + 1]) for images, _ in given for i in range(4)]
    )
    assert labels.tolist() == list(range(12))
    torch.testing.assert_close(features, one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_features_do_not_keep_the_tokens_in_memory(encoder, pool):
    with torch.inference_mode():
        features = pooled_features(encoder, torch.randn(4, 3, 32, 32), pool)
    assert features.untyped_storage().nbytes() == 4 * encoder.dim * 4


def test_extract_lets_go_of_images_it_has_read(encoder):
    given, alive = [], []

    def stream():
        for _ in range(5):
            images, labels = batches(count=1)[0]
            given.append(weakref.ref(images))
            alive.append(sum(reference() is not None for reference in given))
            yield images, labels

    extract(encoder, stream())
    assert max(alive) <= 2  # the new batch, and the last one until it is replaced


def test_extract_measures_in_evaluation_mode_and_gives_each_module_its_mode_back():
    encoder = Encoder("test_vit", img_size=32, drop_path_rate=0.9).train()
    encoder.vit.norm.eval()
    before = [part.training for part in encoder.modules()]
    given = batches()
    assert extract(encoder, given)[0].equal(extract(encoder, given)[0])  # drop path would differ
    assert [part.training for part in encoder.modules()] == before


def test_extract_gives_the_modes_back_after_an_error(encoder):
    encoder.train()
    with pytest.raises(ValueError, match="empty"):
        extract(encoder, [])
    assert encoder.training


def test_features_may_enter_autograd_but_carry_no_gradient(encoder):
    features, _ = extract(encoder, batches())
    assert not features.requires_grad
    torch.nn.Linear(encoder.dim, 2)(features).sum().backward()  # an inference tensor would be refused


def test_features_are_float32_under_autocast_and_training_goes_on(encoder):
    with torch.autocast("cpu", torch.bfloat16):
        features, _ = extract(encoder, batches())
        encoder.train()(
            torch.randn(1, 3, 32, 32)
        ).sum().backward()  # autocast's weight cache must not keep the extract's
    assert features.dtype == torch.float32
    assert encoder.vit.blocks[0].mlp.fc1.weight.grad is not None


def test_diverged_features_are_refused(encoder):
    encoder.vit.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        extract(encoder, batches())

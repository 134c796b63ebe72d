from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mim.conv_encoder import ConvEncoder
from mim.masking import RandomMasking
from mim.methods import SparK
from mim.methods.spark import Filling


def method(model: str = "test_resnet", **settings: Any) -> SparK:
    torch.manual_seed(0)
    return SparK(ConvEncoder(model, img_size=64), RandomMasking(0.5), decoder_width=32, **settings)


def batch(size: int = 2) -> tuple[list[Tensor], Tensor]:
    return [torch.randn(size, 3, 64, 64)], torch.zeros(size, dtype=torch.int64)


def test_loss_is_that_of_a_loop_over_hidden_cells() -> None:
    spark, ((images,), labels) = method().eval(), batch()
    loss = spark.training_step(([images], labels), 0)
    mask = spark.draw_mask(spark.row_generator(2, 0))
    visible = (~mask).float().view(2, 1, 2, 2)
    pixels, errors = spark.decoder(spark.conv_encoder.stages(images, mask), visible), []
    for image, cell in mask.nonzero().tolist():
        rows, columns = slice(cell // 2 * 32, cell // 2 * 32 + 32), slice(cell % 2 * 32, cell % 2 * 32 + 32)
        truth = images[image, :, rows, columns]
        standardised = (truth - truth.mean()) / (truth.var() + 1e-6).sqrt()
        errors.append((pixels[image, :, rows, columns] - standardised).square().mean())
    assert len(errors) == 4
    torch.testing.assert_close(loss, torch.stack(errors).mean())


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext"])
def test_every_trained_parameter_gets_a_gradient(model: str) -> None:
    spark = method(model)
    for layer in spark.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)  # timm's last one of a block starts at 0, and stops the gradient
    spark.training_step(batch(), 0).backward()
    lacking = [name for name, p in spark.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert lacking == []


@pytest.mark.parametrize("training", [True, False])
def test_predictions_do_not_depend_on_hidden_pixels(training: bool) -> None:
    spark, ((images,), _) = method().train(training), batch()
    mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    hidden = mask.view(2, 1, 2, 2).repeat_interleave(32, 2).repeat_interleave(32, 3)
    torch.manual_seed(0)
    one = spark.reconstruct(images, mask)[0]
    spark = method().train(training)
    assert torch.equal(spark.reconstruct(images.masked_fill(hidden, 7.0), mask)[0], one)


def test_holes_are_filled_with_the_learned_vector() -> None:
    filling, visible = Filling(2, 3, 1).eval(), torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    out = filling(torch.tensor([[[[5.0, 0.0]], [[7.0, 0.0]]]]), visible)
    torch.testing.assert_close(out[..., 1:], filling.project(filling.mask_token))


def test_a_decoder_that_cannot_be_halved_five_times_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder_width 40 is no multiple of 32"):
        SparK(ConvEncoder("test_resnet", img_size=64), RandomMasking(0.5), decoder_width=40)


def test_twenty_steps_on_one_batch_lower_the_loss() -> None:
    spark, one = method(), batch()
    optimizer = torch.optim.AdamW(spark.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = spark.training_step(one, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

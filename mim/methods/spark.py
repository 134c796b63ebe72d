"""SparK: designing BERT for convolutional networks (arXiv:2301.03580, 2023).

Hide cells of 32 x 32 pixels from a conv net that is kept from looking at them, in every layer, fill the holes of its
maps with learned vectors on all scales, and let a light U-Net predict the hidden pixels.

Deviations:
    AdamW in place of LAMB. Visible cells are ``int(N * (1 - ratio))``, where the released code rounds.
    Maps are batch-normalised over visible places before holes are filled, for ConvNeXt, too.
    Batch statistics are those of all processes, always; the released code does it by the same means.
"""

import math
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from mim.conv_encoder import ConvEncoder
from mim.errors import UserError
from mim.layers.visible import BatchNorm, enlarged, move_statistics, running_statistics
from mim.masking import Masking
from mim.methods.base import Batch, Method, OptimConfig, single_view
from mim.options.ranges import Count
from mim.patches import patchify, visible_indices
from mim.randomness import RowGenerator
from mim.targets import PixelTarget, Target


class SparK(Method):
    """Masked images for conv nets.

    Args:
        encoder: the ResNet or ConvNeXt to train.
        masking: which cells to hide, squares of 32 px; SparK uses ``RandomMasking`` with ratio 0.6. It must hide
            equally many cells of every image, without guidance.
        target: what is predicted for hidden cells; pixels standardised within their cell, as in the paper, if not
            given.
        decoder_width: channels of the decoder at the coarsest scale, halved at each finer one; 768 in the paper. A
            multiple of 32.
        optim: learning rate, weight decay and warm-up.
    """

    masking: Masking

    def __init__(
        self,
        encoder: ConvEncoder,
        masking: Masking,
        target: Target | None = None,
        decoder_width: Count = 768,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(encoder, masking, optim)
        self.visible_count = self.fixed_visible_count()
        self.target = target or PixelTarget(standardise=True)
        if decoder_width % encoder.strides[-1]:
            raise ValueError(f"decoder_width {decoder_width} is no multiple of {encoder.strides[-1]}")
        self.decoder = UNet(encoder, decoder_width)

    @property
    def conv_encoder(self) -> ConvEncoder:
        """The student, by its family."""
        return cast(ConvEncoder, self.encoder)

    def on_train_start(self) -> None:
        """Refuses torch's own batch statistics over processes, which know no hidden places."""
        if any(isinstance(part, nn.SyncBatchNorm) for part in self.modules()):
            raise UserError(
                "--trainer.sync_batchnorm true: batch statistics are those of all processes without it",
                hint="--trainer.sync_batchnorm false",
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean squared error of hidden cells."""
        images, valid = single_view(batch)
        mask = self.draw_mask(self.row_generator(len(images), batch_idx))  # (B, N)
        prediction, hidden = self.reconstruct(images, mask)
        target, weights = self.target.measured(images, self.encoder.grid, hidden, valid)
        loss = self.target.loss(prediction, target, weights)
        self.log("train/loss", loss)
        self.skip_step_unless_finite(running_statistics(self))  # no loss sees them
        return self.anchored(loss, images)

    def after_optimizer_step(self, step: int) -> None:
        """Statistics of the batch join the running ones, unless the step was skipped."""
        move_statistics(self, unless=self.step_was_skipped)

    def reconstruct(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions for the hidden cells, ``(B, M, 32*32*C)``, and their places, ``(B, M)``."""
        hidden = visible_indices(~mask, mask.shape[1] - self.visible_count)  # (B, M)
        visible = (~mask).view(-1, 1, *self.encoder.grid).to(images.dtype)  # (B, 1, h, w)
        pixels = self.decoder(self.conv_encoder.stages(images, mask), visible)  # (B, C, H, W)
        return patchify(pixels.contiguous(), self.encoder.patch_size, hidden), hidden

    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """The visible part of ``images``, grey elsewhere, and the same with hidden pixels predicted.

        The masks depend on the row alone, so pictures of one batch compare over training.
        """
        mask = self.draw_mask(RowGenerator.for_rows(0, 0, len(images), images.device))
        prediction, hidden = self.reconstruct(images, mask)
        return self.target.pictures(prediction, images, self.encoder.grid, hidden)


class UNet(nn.Module):
    """Pixels from maps with holes: each scale's map is filled, and added to what comes from the coarser one.

    Args:
        encoder: whose maps they are.
        width: channels at the coarsest scale, halved at each finer one.
    """

    def __init__(self, encoder: ConvEncoder, width: int) -> None:
        super().__init__()
        steps = int(math.log2(encoder.strides[-1]))
        widths = [width >> step for step in range(steps + 1)]
        maps = list(zip(encoder.strides, encoder.widths, strict=True))[::-1]  # coarsest first
        self.fill = nn.ModuleList(
            Filling(channels, widths[steps - int(math.log2(stride))], 1 if number == 0 else 3)
            for number, (stride, channels) in enumerate(maps)
        )
        self.up = nn.ModuleList(_upwards(*pair) for pair in pairwise(widths))
        self.pixels = nn.Conv2d(widths[-1], encoder.in_chans, 1)

    def forward(self, maps: list[Tensor], visible: Tensor) -> Tensor:
        """``(B, C, H, W)`` from maps, the finest first, 0 where ``visible (B, 1, h, w)`` is."""
        x: Any = 0.0
        for number, up in enumerate(self.up):
            if number < len(self.fill):
                x = x + self.fill[number](maps[-1 - number], visible)
            x = up(x)
        pixels: Tensor = self.pixels(x)
        return pixels


class Filling(nn.Module):
    """A map with a learned vector in its holes, at the width of the decoder.

    Args:
        channels: of the map.
        width: of the decoder at its scale.
        kernel: side of the convolution between the two.
    """

    def __init__(self, channels: int, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = BatchNorm(channels)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, channels, 1, 1), std=0.02))
        self.project = nn.Conv2d(channels, width, kernel, padding=kernel // 2)

    def forward(self, features: Tensor, visible: Tensor) -> Tensor:
        """``(B, width, H, W)`` from ``(B, channels, H, W)`` with holes where ``visible (B, 1, h, w)`` is 0."""
        shown = enlarged(visible, (features.shape[2], features.shape[3])).to(features.dtype)
        filled = torch.where(shown.bool(), self.norm(features, shown), self.mask_token.to(features.dtype))
        projected: Tensor = self.project(filled)
        return projected


def _upwards(width: int, finer: int) -> nn.Sequential:
    """Twice the size, ``width`` to ``finer`` channels."""
    return nn.Sequential(
        nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        BatchNorm(width),
        nn.ReLU6(),
        nn.Conv2d(width, finer, 3, padding=1, bias=False),
        BatchNorm(finer),
    )

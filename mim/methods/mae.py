"""MAE: masked autoencoders are scalable vision learners (arXiv:2111.06377, 2021).

Hide three quarters of the patches, encode only the rest, and let a light decoder predict the hidden pixels.

Deviations, none of which changes the function computed:
    Patches are projected after hidden ones are dropped, which equals the reference up to rounding; visible tokens keep
    raster order instead of a shuffled one; the decoder predicts hidden patches only.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from mim.encoder import Encoder
from mim.layers.decoder import Decoder
from mim.layers.initialisation import initialise
from mim.masking import Masking
from mim.methods.base import Batch, Method, OptimConfig, single_view
from mim.patches import replace_patches, visible_indices
from mim.randomness import RowGenerator
from mim.ranges import Count
from mim.targets import PixelTarget


class MAE(Method):
    """Masked autoencoder.

    Args:
        encoder: the ViT to train; MAE uses ``positions: sincos``.
        masking: what to hide; MAE uses ``RandomMasking`` with ratio 0.75. It must hide equally many patches of every
            image, without guidance.
        decoder_width: width of the decoder; 512 in the paper.
        decoder_depth: blocks of the decoder; 8 in the paper.
        decoder_heads: attention heads of the decoder; 16 in the paper.
        standardise: predict pixels standardised within their patch, as the released models do; raw pixels otherwise.
        optim: learning rate, weight decay and warm-up.
    """

    guides: ClassVar[bool] = False  # whether there are scores for the policy

    def __init__(
        self,
        encoder: Encoder,
        masking: Masking,
        decoder_width: Count = 512,
        decoder_depth: Count = 8,
        decoder_heads: Count = 16,
        standardise: bool = True,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(encoder, masking, optim)
        visible_count = masking.visible_count(encoder.grid[0] * encoder.grid[1])
        if masking.guided != self.guides or visible_count is None:
            needs = "guided" if self.guides else "unguided"
            raise ValueError(f"{self.name} needs a policy that hides equally many patches, {needs}; not {masking}")
        self.visible_count = visible_count
        self.target = PixelTarget(standardise)
        self.decoder = Decoder(
            encoder.dim,
            encoder.grid,
            encoder.num_prefix,
            out_dim=self.target.dim(encoder),
            width=decoder_width,
            depth=decoder_depth,
            heads=decoder_heads,
        )
        initialise(self.decoder)
        if not encoder.pretrained:
            initialise(encoder)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean squared error of hidden patches."""
        images, valid = single_view(batch)
        generator = self.row_generator(len(images), batch_idx)
        mask = self.draw(images, generator)  # (B, N)
        prediction, hidden = self.reconstruct(images, mask)
        weights = self.target.weights(valid, images, self.encoder.grid, hidden)
        target = self.target(images, self.encoder.grid, hidden, weights)
        if weights is None:
            loss = F.mse_loss(prediction, target)
        else:
            loss = self.target.mean_error(self.target.error(prediction, target, weights), weights)
        self.log("train/loss", loss)
        return loss

    def draw(self, images: Tensor, generator: RowGenerator) -> Tensor:
        """Masks ``(B, N)`` for this point of the run."""
        mask: Tensor = self.masking(len(images), self.encoder.grid, progress=self.progress, generator=generator)
        return mask

    def reconstruct(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions for the hidden patches, ``(B, M, p*p*C)``, and their places, ``(B, M)``."""
        latent = self.encoder(images, mask, visible_count=self.visible_count)  # (B, P + K, D)
        hidden = visible_indices(~mask, mask.shape[1] - self.visible_count)  # (B, M)
        return self.decoder(latent, mask, hidden), hidden

    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """The visible part of ``images``, grey elsewhere, and the same with hidden patches predicted.

        The masks depend on the row alone, so pictures of one batch compare over training.
        """
        generator = RowGenerator.for_rows(0, 0, len(images), images.device)
        mask = self.draw(images, generator)
        prediction, hidden = self.reconstruct(images, mask)
        pixels = self.target.to_pixels(prediction, images, self.encoder.grid, hidden)
        size = self.encoder.patch_size
        return {
            "hidden": replace_patches(images, size, hidden, 0.0),
            "reconstruction": replace_patches(images, size, hidden, pixels),
        }

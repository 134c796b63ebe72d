"""MAE: masked autoencoders are scalable vision learners (arXiv:2111.06377, 2021).

Hide three quarters of the patches, encode only the rest, and let a light decoder predict the hidden pixels, or another
``Target``.

Deviations, none of which changes the function computed:
    Patches are projected after hidden ones are dropped, which equals the reference up to rounding; visible tokens keep
    raster order instead of a shuffled one; the decoder predicts hidden patches only.
"""

from typing import ClassVar

from torch import Tensor

from mim.encoder import Encoder
from mim.layers.decoder import Decoder
from mim.layers.initialisation import initialise
from mim.masking import Masking
from mim.methods.base import Batch, Method, OptimConfig, single_view
from mim.options.ranges import Count
from mim.patches import replace_patches, visible_indices
from mim.randomness import RowGenerator
from mim.targets import PixelTarget, Target


class MAE(Method):
    """Masked autoencoder.

    Args:
        encoder: the ViT to train; MAE uses ``positions: sincos``.
        masking: what to hide; MAE uses ``RandomMasking`` with ratio 0.75. It must hide equally many patches of every
            image, without guidance.
        target: what is predicted for hidden patches; pixels standardised within their patch, as in the released models,
            if not given.
        decoder_width: width of the decoder; 512 in the paper.
        decoder_depth: blocks of the decoder; 8 in the paper.
        decoder_heads: attention heads of the decoder; 16 in the paper.
        optim: learning rate, weight decay and warm-up.
    """

    masking: Masking
    guides: ClassVar[bool] = False  # whether there are scores for the policy

    def __init__(
        self,
        encoder: Encoder,
        masking: Masking,
        target: Target | None = None,
        decoder_width: Count = 512,
        decoder_depth: Count = 8,
        decoder_heads: Count = 16,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(encoder, masking, optim)
        visible_count = masking.visible_count(encoder.grid[0] * encoder.grid[1])
        if masking.guided != self.guides or visible_count is None:
            needs = "guided" if self.guides else "unguided"
            raise ValueError(f"{self.name} needs a policy that hides equally many patches, {needs}; not {masking}")
        self.visible_count = visible_count
        self.target = target or PixelTarget(standardise=True)
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
        """Error of hidden patches; of pixels, the mean square."""
        images, valid = single_view(batch)
        generator = self.row_generator(len(images), batch_idx)
        mask = self.draw(images, generator, valid)  # (B, N)
        prediction, hidden = self.reconstruct(images, mask)
        target, weights = self.target.measured(images, self.encoder.grid, hidden, valid)
        loss = self.target.loss(prediction, target, weights)
        self.log("train/loss", loss)
        return self.anchored(loss, images)

    def draw(self, images: Tensor, generator: RowGenerator, valid: Tensor | None = None) -> Tensor:
        """Masks ``(B, N)`` for this point of the run; ``valid (B, 1, H, W)`` says which pixels were measured."""
        mask: Tensor = self.masking(len(images), self.encoder.grid, progress=self.progress, generator=generator)
        return mask

    def reconstruct(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions for the hidden patches, ``(B, M, dim)``, and their places, ``(B, M)``."""
        latent = self.encoder(images, mask, visible_count=self.visible_count)  # (B, P + K, D)
        hidden = visible_indices(~mask, mask.shape[1] - self.visible_count)  # (B, M)
        return self.decoder(latent, mask, hidden), hidden

    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """The visible part of ``images``, grey elsewhere, and the same with hidden pixels predicted, if they are.

        The masks depend on the row alone, so pictures of one batch compare over training.
        """
        generator = RowGenerator.for_rows(0, 0, len(images), images.device)
        mask = self.draw(images, generator)
        prediction, hidden = self.reconstruct(images, mask)
        pixels = self.target.to_pixels(prediction, images, self.encoder.grid, hidden)
        pictures = {"hidden": replace_patches(images, self.encoder.patch_size, hidden, 0.0)}
        if pixels is not None:
            pictures["reconstruction"] = replace_patches(images, self.encoder.patch_size, hidden, pixels)
        return pictures

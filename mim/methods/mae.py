"""MAE: masked autoencoders are scalable vision learners (arXiv:2111.06377, 2021).

Hide three quarters of the patches, encode only the rest, and let a light decoder predict the hidden pixels, or another
``Target``.

Deviations, none of which changes the function computed:
    Patches are projected after hidden ones are dropped, which equals the reference up to rounding; visible tokens keep
    raster order instead of a shuffled one; the decoder predicts hidden patches only.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mim.encoder import Encoder
from mim.layers.cross_attention import CrossDecoder
from mim.layers.decoder import Decoder, decoder_shape
from mim.layers.initialisation import initialise
from mim.layers.token_dropping import PlaceErrors
from mim.masking import Masking
from mim.methods.base import Batch, Method, OptimConfig, single_view
from mim.options.ranges import Count, SomeShare
from mim.patches import some_of, visible_indices
from mim.randomness import RowGenerator
from mim.targets import PixelTarget, Target


@dataclass(frozen=True)
class CrossConfig:
    """A decoder of cross-attention alone: hidden patches look at visible ones, not at each other.

    Args:
        predicted: share of the hidden patches, drawn anew at every step, that is predicted; 1/3 in the paper's fast
            recipe, a quarter of the image. The learning rate is scaled by it.
        mixed: last blocks of the encoder whose tokens every block of the decoder combines in its own way; 12 in the
            paper for a ViT-B, 1 for the encoder's output alone.
    """

    predicted: SomeShare = 1.0
    mixed: Count = 1


class MAE(Method):
    """Masked autoencoder.

    Args:
        encoder: the ViT to train; MAE uses ``positions: sincos``.
        masking: what to hide; MAE uses ``RandomMasking`` with ratio 0.75. It must hide equally many patches of every
            image, without guidance.
        target: what is predicted for hidden patches; pixels standardised within their patch, as in the released models,
            if not given.
        decoder_width: width of the decoder; 512 in the paper, two thirds of the encoder's (512 at most) if null.
        decoder_depth: blocks of the decoder; 8 in the paper.
        decoder_heads: attention heads of the decoder; 16 in the paper, one per 32 of its width if null.
        optim: learning rate, weight decay and warm-up.
        cross: CrossMAE's decoder in place of the usual one (arXiv:2401.14391); not used if not given.
        middle_share: share of the visible tokens that go through the middle blocks of the encoder while it is trained,
            those of the places with the largest running error (token dropping, arXiv:2203.13240, 0.5 there); 1 for all.
    """

    masking: Masking
    guides: ClassVar[bool] = False  # whether there are scores for the policy

    def __init__(
        self,
        encoder: Encoder,
        masking: Masking,
        target: Target | None = None,
        decoder_width: Count | None = 512,
        decoder_depth: Count = 8,
        decoder_heads: Count | None = 16,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
        cross: CrossConfig | None = None,
        middle_share: SomeShare = 1.0,
    ) -> None:
        super().__init__(encoder, masking, optim)
        self.visible_count = self.fixed_visible_count(self.guides)
        self.target = target or PixelTarget(standardise=True)
        self.cross = cross
        self.patches = math.prod(encoder.grid)
        sizes = decoder_shape(encoder.dim, decoder_width, decoder_depth, decoder_heads)
        out_dim = self.target.dim(encoder)
        self.decoder: nn.Module
        if cross is None:
            self.decoder = Decoder(encoder.dim, encoder.grid, encoder.num_prefix, out_dim, **sizes)
        else:
            if cross.mixed > encoder.depth:
                raise ValueError(f"cross.mixed {cross.mixed}: the encoder has {encoder.depth} blocks")
            self.decoder = CrossDecoder(encoder.dim, encoder.grid, out_dim, **sizes, mixed=cross.mixed)
        initialise(self.decoder)
        if not encoder.pretrained:
            initialise(encoder)
        self.place_errors = None if middle_share == 1 else PlaceErrors(self.patches, middle_share)
        if self.place_errors is not None:
            encoder.check_middle()
            if cross is not None and cross.mixed > 1:
                raise ValueError(f"middle_share: cross.mixed {cross.mixed} reads blocks that some tokens leave out")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Error of hidden patches; of pixels, the mean square."""
        images, valid = single_view(batch)
        generator = self.row_generator(len(images), batch_idx)
        mask = self.draw(images, generator, valid)  # (B, N)
        prediction, hidden = self.reconstruct(images, mask, generator)
        target, weights = self.target.measured(images, self.encoder.grid, hidden, valid)
        loss = self.target.loss(prediction, target, weights)
        if self.place_errors is not None:
            self.place_errors.add(self.target.errors(prediction, target, weights), hidden, weights)
        self.log("train/loss", loss)
        return self.anchored(loss, images)

    def after_optimizer_step(self, step: int) -> None:
        """Moves the running errors by which tokens go through the middle blocks."""
        if self.place_errors is not None:
            self.place_errors.update(unless=self.step_was_skipped)

    def draw(self, images: Tensor, generator: RowGenerator, valid: Tensor | None = None) -> Tensor:
        """Masks ``(B, N)`` for this point of the run; ``valid (B, 1, H, W)`` says which pixels were measured."""
        return self.draw_mask(generator)

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up; that of a part of the hidden patches is scaled by their share."""
        return super().peak_lr * (self.cross.predicted if self.cross else 1)

    def reconstruct(self, images: Tensor, mask: Tensor, generator: RowGenerator | None = None) -> tuple[Tensor, Tensor]:
        """Predictions for hidden patches, ``(B, M, dim)``, and their places, ``(B, M)``.

        Args:
            images: ``(B, C, H, W)``.
            mask: ``(B, N)``.
            generator: draws those that are predicted, if not all are.
        """
        hidden = visible_indices(~mask, self.patches - self.visible_count)  # (B, M)
        if self.cross is None:
            return self.decoder(self.encode(images, mask), mask, hidden), hidden
        hidden = hidden if generator is None else self.chosen(hidden, generator)
        return self.decoder(self.layers(images, mask), hidden), hidden

    def encode(self, images: Tensor, mask: Tensor) -> Tensor:
        """Tokens ``(B, P + K, D)`` of visible patches, of which some may have passed by the middle blocks."""
        passing = None
        if self.place_errors is not None:
            passing = self.place_errors.important(visible_indices(mask, self.visible_count))
        tokens: Tensor = self.encoder(images, mask, visible_count=self.visible_count, passing=passing)
        return tokens

    def chosen(self, hidden: Tensor, generator: RowGenerator) -> Tensor:
        """A random part of ``hidden (B, M)`` in raster order, if only a part is to be predicted."""
        count = max(1, round(hidden.shape[1] * (self.cross.predicted if self.cross else 1)))
        if count == hidden.shape[1]:
            return hidden
        return some_of(hidden, count, generator.rand(hidden.shape[1]))

    def layers(self, images: Tensor, mask: Tensor) -> list[Tensor]:
        """Tokens ``(B, P + K, D)`` of visible patches after the blocks that the decoder looks at, the last one normed.

        The others are normed behind their combination; the encoder's own norm is trained with the last one.
        """
        if not self.cross or self.cross.mixed == 1:
            return [self.encode(images, mask)]
        depth = self.encoder.depth
        tokens = self.encoder.after_blocks(
            images, range(depth - self.cross.mixed, depth), mask, visible_count=self.visible_count
        )
        return [*(layer.x for layer in tokens[:-1]), self.encoder.vit.norm(tokens[-1].x)]

    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """The visible part of ``images``, grey elsewhere, and the same with hidden pixels predicted, if they are.

        The masks depend on the row alone, so pictures of one batch compare over training.
        """
        generator = RowGenerator.for_rows(0, 0, len(images), images.device)
        mask = self.draw(images, generator)
        prediction, hidden = self.reconstruct(images, mask)
        return self.target.pictures(prediction, images, self.encoder.grid, hidden)

"""SimMIM: a simple framework for masked image modeling (arXiv:2111.09886, 2021).

Replace large squares of the image by a learned token, encode the whole sequence, and let one linear map predict the
hidden pixels, or another ``Target``, from the tokens that stand in their place.

Deviations:
    Only hidden patches are predicted; the function is the same.
    Positions are those of the encoder, where the paper adds a relative bias that timm's plain ViTs do not have, and the
    learning rate falls along half a cosine, not in one step at 7/8 of the run.
"""

import math

import torch
from torch import Tensor, nn

from mim.encoder import Encoder
from mim.layers.token_dropping import PlaceErrors
from mim.masking import Masking
from mim.methods.base import Batch, Method, OptimConfig, single_view
from mim.options.ranges import SomeShare
from mim.patches import gather_tokens, visible_indices
from mim.randomness import RowGenerator
from mim.targets import PixelTarget, Target


class SimMIM(Method):
    """Masked images as whole sequences with a mask token.

    Args:
        encoder: the ViT to train.
        masking: what to hide; SimMIM uses ``GridMasking`` with ratio 0.6 and squares of 32 px at 224 px, which
            ``cell: null`` means for any patch size. It must hide equally many patches of every image, without guidance.
        target: what is predicted for hidden patches; pixels and the mean of their absolute errors, as in the paper, if
            not given.
        optim: learning rate, weight decay and warm-up.
        middle_share: share of all tokens that go through the middle blocks of the encoder while it is trained, those of
            the places with the largest running error (token dropping, arXiv:2203.13240, 0.5 there); 1 for all.
    """

    masking: Masking

    def __init__(
        self,
        encoder: Encoder,
        masking: Masking,
        target: Target | None = None,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
        middle_share: SomeShare = 1.0,
    ) -> None:
        super().__init__(encoder, masking, optim)
        self.visible_count = self.fixed_visible_count()
        self.target = target or PixelTarget(distance="absolute")
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, encoder.dim), std=0.02))
        self.predict = nn.Linear(encoder.dim, self.target.dim(encoder))
        self.place_errors = None if middle_share == 1 else PlaceErrors(math.prod(encoder.grid), middle_share)
        if self.place_errors is not None:
            encoder.check_middle()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Error of hidden patches; of pixels, the mean absolute one."""
        images, valid = single_view(batch)
        mask = self.draw_mask(self.row_generator(len(images), batch_idx))  # (B, N)
        prediction, hidden = self.reconstruct(images, mask)
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

    def reconstruct(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions for the hidden patches, ``(B, M, dim)``, and their places, ``(B, M)``."""
        passing = None
        if self.place_errors is not None:
            passing = self.place_errors.important(torch.arange(mask.shape[1], device=mask.device).expand_as(mask))
        tokens = self.encoder(images, mask, self.mask_token, passing=passing)  # (B, P + N, D)
        hidden = visible_indices(~mask, mask.shape[1] - self.visible_count)  # (B, M)
        prediction: Tensor = self.predict(gather_tokens(tokens, self.encoder.num_prefix + hidden))
        return prediction, hidden

    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """The visible part of ``images``, grey elsewhere, and the same with hidden pixels predicted, if they are.

        The masks depend on the row alone, so pictures of one batch compare over training.
        """
        mask = self.draw_mask(RowGenerator.for_rows(0, 0, len(images), images.device))
        prediction, hidden = self.reconstruct(images, mask)
        return self.target.pictures(prediction, images, self.encoder.grid, hidden)

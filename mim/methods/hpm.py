"""HPM: hard patches mining for masked image modeling (arXiv:2304.05919, 2023).

Learn, beside the reconstruction, which hidden patches will be hard to reconstruct, and hide more and more of those.

Deviations:
    The share of hardest patches moves at every step unless ``HardPatchMasking.stairs`` asks for one stair per epoch, as
    in the reference: a run here is one sequence of steps, and the two differ by a stair at most.
    The teacher averages only what predicts difficulty, since its reconstruction would not be used.
    The ranking loss takes logits instead of probabilities plus 1e-6, and every pair once, which gives the same mean.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.encoder import Encoder
from mim.layers.decoder import FillMasked, Trunk, decoder_shape
from mim.layers.initialisation import initialise
from mim.layers.teacher import Teacher
from mim.masking import HardPatchMasking
from mim.methods.base import Batch, Method, OptimConfig, hidden_last, single_view
from mim.options.ranges import Count, Share
from mim.patches import gather_tokens, patch_statistics, visible_indices
from mim.randomness import RowGenerator
from mim.schedules import linear
from mim.targets import Target

_RAMP = 100  # epochs in which the teacher's momentum rises, however long the run is
_DRAWS = 8  # masks that the picture of errors is averaged over


@dataclass(frozen=True)
class DifficultyConfig:
    """How the difficulty of patches is learnt and remembered.

    Args:
        loss: ``relative`` ranks the hidden patches of an image by their error, as in the paper; ``absolute`` regresses
            their error, standardised within the image.
        units: outputs that are averaged to one difficulty; 768 in the reference, 1 gives the same function with fewer
            weights.
        momentum: of the teacher in the first epoch, and from the 100th epoch on.
    """

    loss: Literal["relative", "absolute"] = "relative"
    units: Count = 768
    momentum: tuple[Share, Share] = (0.999, 0.9999)


class HPM(Method):
    """Hard patches mining.

    Args:
        encoder: the ViT to train; HPM uses ``positions: sincos``.
        masking: how many patches are hidden, and which share of them is the hardest.
        target: what is reconstructed, and so what is hard: ``PixelTarget``, as in the released recipes, or
            ``FeatureTarget``.
        difficulty: how difficulty is learnt.
        decoder_width: width of the two decoders; 512 in the paper, two thirds of the encoder's (512 at most) if null.
        decoder_depth: blocks of each decoder; 8 in the paper.
        decoder_heads: attention heads of the decoders; 16 in the paper, one per 32 of their width if null.
        optim: learning rate, weight decay and warm-up.
    """

    masking: HardPatchMasking

    def __init__(
        self,
        encoder: Encoder,
        masking: HardPatchMasking,
        target: Target,
        difficulty: DifficultyConfig = DifficultyConfig(),
        decoder_width: Count | None = 512,
        decoder_depth: Count = 8,
        decoder_heads: Count | None = 16,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(encoder, masking, optim)
        self.settings = difficulty
        self.target = target
        self.patches = math.prod(encoder.grid)
        self.visible_count = masking.visible_count(self.patches)
        shape = decoder_shape(encoder.dim, decoder_width, decoder_depth, decoder_heads)
        self.fill = FillMasked(encoder.dim, encoder.grid, encoder.num_prefix, shape["width"])
        self.reconstruction = Trunk(encoder.num_prefix, target.dim(encoder), **shape)
        self.difficulty = Trunk(encoder.num_prefix, difficulty.units, **shape)
        for part in (self.fill, self.reconstruction, self.difficulty):
            initialise(part)
        if not encoder.pretrained:
            initialise(encoder)
        judge = {"encoder": self.encoder, "fill": self.fill, "difficulty": self.difficulty}
        self.teacher = Teacher(nn.ModuleDict(judge))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Error of the hidden patches plus the loss of their predicted difficulty, one to one."""
        images, valid = single_view(batch)
        scores = self.scores(images) if self.masking.needs_scores else None  # (B, N)
        guide = None if scores is None else hidden_last(scores, valid, self.encoder)
        mask = self.draw_mask(self.row_generator(len(images), batch_idx), guide)  # (B, N)
        prediction, difficulty, hidden = self.predict(images, mask)
        target, weights = self.target.measured(images, self.encoder.grid, hidden, valid)
        error = self.target.errors(prediction, target, weights)  # (B, M)
        truth = error.detach()  # patches must not become easy to rank; the predictor's input is not detached
        counted = None if weights is None else weights.amax(dim=-1)  # (B, M), 0 for patches that are no target
        pairs = hidden_pairs(difficulty, truth, counted)
        reconstruction = self.target.mean_error(error, weights)
        ranking = (
            ranking_loss(*pairs) if self.settings.loss == "relative" else regression_loss(difficulty, truth, counted)
        )
        loss = reconstruction + ranking
        self.log_dict({"train/loss": loss, "train/reconstruction": reconstruction, "train/difficulty": ranking})
        self.log("health/rank_correlation", rank_correlation(*pairs))
        if scores is not None:
            self.log_dict(self.health(gather_tokens(scores[..., None], hidden)[..., 0], truth, counted))
        return self.anchored(loss, images)

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """How hard the teacher expects every patch to be, looking at the whole image: ``(B, N)`` float32."""
        judge = self.teacher.module
        nothing = torch.zeros(len(images), self.patches, dtype=torch.bool, device=images.device)
        scores = _averaged(judge["difficulty"](judge["fill"](judge["encoder"](images), nothing)))
        self.skip_step_unless_finite(scores)  # the loss would not tell: masks are drawn from any scores
        return scores

    def predict(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction ``(B, M, dim)`` and difficulty ``(B, M)`` of hidden patches, and their places ``(B, M)``."""
        latent = self.encoder(images, mask, visible_count=self.visible_count)  # (B, P + K, D)
        hidden = visible_indices(~mask, self.patches - self.visible_count)  # (B, M)
        sequence = self.fill(latent, mask)  # (B, P + N, E)
        return self.reconstruction(sequence, hidden), _averaged(self.difficulty(sequence, hidden)), hidden

    def health(self, scores: Tensor, error: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
        """Whether the teacher's ``scores (B, M)`` of hidden patches are worth following, given their ``error (B, M)``.

        Patches that ``counted (B, M)`` gives 0 are in no pair; in the means their error is 0.

        Returns:
            Rank correlation of the two; share of the hidden patches that were chosen as the hardest; and the error of
            all hidden patches over that of random ones, estimated from those that were hidden by chance.
        """
        hard, hidden = self.masking.hard_count(self.patches, self.progress), error.shape[1]
        values = {
            "health/teacher_rank_correlation": rank_correlation(*hidden_pairs(scores, error, counted)),
            "health/hard_share": error.new_full((), hard / hidden),
        }
        if hard < hidden:
            # The hardest of all patches are hidden, so they are the hardest of the hidden ones.
            ordered = error.gather(1, scores.argsort(dim=1, descending=True, stable=True))
            chosen, rest = ordered[:, :hard].sum() / max(1, error.shape[0] * hard), ordered[:, hard:].mean()
            values["health/error_over_random"] = error.mean() / torch.lerp(rest, chosen, hard / self.patches)
        return values

    def after_optimizer_step(self, step: int) -> None:
        """Moves the teacher towards the student."""
        self.teacher.update(self.momentum(step), unless=self.step_was_skipped)

    def momentum(self, step: int) -> float:
        """Share of itself that the teacher keeps in the step after ``step`` finished ones; constant in an epoch."""
        return linear(min(self.plan.epoch(step) / _RAMP, 1.0), *self.settings.momentum)

    @torch.no_grad()
    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """What is hidden at this point of the run and its reconstruction; predicted difficulty and true error as maps.

        Random numbers depend on the row alone, so pictures of one batch compare over training. Difficulty is the
        teacher's of every patch; the error of a patch is its mean over several masks that hide it.
        """
        grid, scores = self.encoder.grid, self.scores(images)
        mask = self.draw_mask(RowGenerator.for_rows(0, 0, len(images), images.device), scores)
        prediction, _, hidden = self.predict(images, mask)
        pictures = self.target.pictures(prediction, images, grid, hidden)
        return pictures | {"difficulty": scores.view(-1, *grid), "error": self._error_map(images, scores)}

    def _error_map(self, images: Tensor, scores: Tensor) -> Tensor:
        """Mean error ``(B, h, w)`` of every patch over masks that hide it; 0 if none does."""
        total = torch.zeros_like(scores)
        times = torch.zeros_like(scores)
        generator = RowGenerator.for_rows(1, 0, len(images), images.device)
        for _ in range(_DRAWS):
            prediction, _, hidden = self.predict(images, mask := self.draw_mask(generator, scores))
            error = self.target.error(prediction, self.target(images, self.encoder.grid, hidden))
            total, times = total.scatter_add(1, hidden, error), times + mask
        return (total / times.clamp(min=1)).view(-1, *self.encoder.grid)


def hidden_pairs(difficulty: Tensor, error: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every pair of patches of an image once: each patch with the ``M // 2`` that follow it, beginning anew at the end.

    Args:
        difficulty: ``(B, M)`` float32, as predicted.
        error: ``(B, M)`` float32, as it came.
        counted: ``(B, M)``, 1 for a patch that is a target and 0 for one that is not; all are if not given.

    Returns:
        By how much the follower is predicted to be harder, ``(B, M, M // 2)``, and whether it was: 1, -1, or 0 for
        pairs that do not count.
    """
    gap, order = (_followers(values) - values[..., None] for values in (difficulty, error))
    order = order.sign()
    if error.shape[1] % 2 == 0:  # opposite patches follow each other
        order[:, error.shape[1] // 2 :, -1] = 0
    return gap, order if counted is None else order * counted[..., None] * _followers(counted)


def ranking_loss(gap: Tensor, order: Tensor) -> Tensor:
    """Mean logistic loss of the pairs that count: ln 2 for indifference, 0 for certainty in the true order."""
    counts = order.abs()
    return (F.softplus(-order * gap) * counts).sum() / counts.sum().clamp(min=1)


def regression_loss(difficulty: Tensor, error: Tensor, counted: Tensor | None = None) -> Tensor:
    """Squared distance of ``difficulty (B, M)`` from ``error (B, M)`` standardised within each image.

    Only over patches that ``counted (B, M)`` gives 1, if it is given.
    """
    if counted is None:
        var, mean = torch.var_mean(error, dim=1, keepdim=True)
        return F.mse_loss(difficulty, (error - mean) / (var + 1e-6).sqrt())
    mean, std = patch_statistics(error, counted)
    distance = (difficulty - (error - mean) / std).square() * counted
    return distance.sum() / counted.sum().clamp(min=1)


@torch.no_grad()
def rank_correlation(gap: Tensor, order: Tensor) -> Tensor:
    """Kendall's: share of the pairs predicted in their true order less the share of the others; 0 by chance."""
    return (gap.sign() * order).sum() / order.abs().sum().clamp(min=1)


def _followers(values: Tensor) -> Tensor:
    """For every one of ``(B, M)`` the ``M // 2`` after it, round the end: ``(B, M, M // 2)``."""
    half = values.shape[1] // 2
    return torch.cat([values, values[:, :half]], dim=1).unfold(1, half, 1)[:, 1:]


def _averaged(outputs: Tensor) -> Tensor:
    """``(B, M, units)`` to one difficulty per patch, ``(B, M)`` float32."""
    return outputs.float().mean(dim=2)

"""I-JEPA: self-supervised learning from images with a joint-embedding predictive architecture (arXiv:2301.08243, 2023).

Encode one large block of the image; from it and a position, a narrow predictor tells what a slowly moving teacher, who
sees the whole image, makes of the patches of several other blocks. No pixel is predicted. With ``stop`` it is StoP
(arXiv:2308.00566, 2023): positions of what is asked for are noisy, through the matrix that projects the context. With
``guard`` the context's features are kept from collapsing by SIGReg (arXiv:2511.08544, 2025).

Deviations:
    Contexts have one size over the global batch; in the released code each loader process finds a size of its own.
    The query has a mask token in StoP, too, and noise passes the shared matrix without its bias; the released StoP has
    the bias in the token's place. Class token and registers, where a ViT has them, are part of the context.
    SIGReg beside I-JEPA is ours: on patches behind the encoder's norm, without the projector of LeJEPA.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.distributed.devices import send
from mim.encoder import Encoder
from mim.layers.decoder import Trunk
from mim.layers.initialisation import initialise
from mim.layers.positions import sincos_positions
from mim.layers.sigreg import sigreg
from mim.layers.teacher import Teacher
from mim.masking import MultiBlockMasking
from mim.masking.multi_block import Blocks
from mim.methods.base import Batch, Method, OptimConfig, single_view
from mim.options.ranges import Count, NotNegative, Positive, Share
from mim.patches import feature_spread, gather_tokens, measured_patches, replace_patches, visible_indices
from mim.randomness import RowGenerator, keyed_generator
from mim.schedules import linear


@dataclass(frozen=True)
class GuardConfig:
    """What keeps the context's features near a standard normal distribution over the images, and so from collapsing.

    Args:
        weight: of the statistic beside the loss; LeJEPA takes 0.02 beside 0.98.
        patches: visible patches of an image that are judged, the same numbers in all images of a step.
        directions: that features are projected on, drawn anew for each step; 256 in LeJEPA.
    """

    weight: Positive = 0.02
    patches: Count = 4
    directions: Count = 256


class IJEPA(Method):
    """Prediction of a teacher's features of some blocks from another; the teacher is what is evaluated and exported.

    Args:
        encoder: the student; in the paper with ``positions: sincos`` and without class token.
        masking: which block is seen and which are predicted.
        predictor_width: width of the predictor; 384 in the paper.
        predictor_depth: blocks of the predictor; 6 for ViT-B, 12 for larger ones.
        predictor_heads: attention heads of the predictor; 12 for ViT-B, as the encoder's.
        momentum: share of the teacher that a step keeps, at the first step; it rises to 1 in a straight line.
        stop: standard deviation of the noise on positions of targets; 0.25 in StoP for ViT-B and 0.2 for ViT-H. None,
            as in I-JEPA, if not given.
        optim: learning rate, weight decay and warm-up.
        guard: against collapse; none, as in I-JEPA, if not given.
    """

    masking: MultiBlockMasking

    def __init__(
        self,
        encoder: Encoder,
        masking: MultiBlockMasking,
        predictor_width: Count = 384,
        predictor_depth: Count = 6,
        predictor_heads: Count = 12,
        momentum: Share = 0.996,
        stop: NotNegative | None = None,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
        guard: GuardConfig | None = None,
    ) -> None:
        super().__init__(encoder, masking, optim)
        self.guard = guard
        self.predictor = BlockPredictor(
            encoder.dim, encoder.grid, encoder.num_prefix, predictor_width, predictor_depth, predictor_heads
        )
        initialise(self.predictor)
        self.teacher = Teacher(encoder)
        self.first_momentum, self.stop = momentum, stop

    @property
    def evaluated(self) -> Encoder:
        """The teacher."""
        encoder: Encoder = self.teacher.module
        return encoder

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Smooth absolute difference of predicted and taught features of the target blocks."""
        images, valid = single_view(batch)
        blocks = self.draw(len(images), batch_idx)
        target = gather_blocks(self.teach(images), blocks.targets)  # (B, T, M, D)
        noise = self.noise(target.shape, self.row_generator(len(images), batch_idx))
        context = self.encode(images, blocks)  # (B, P + K, D)
        prediction = self.ask(context, blocks, noise)  # (B, T, M, D)
        error = F.smooth_l1_loss(prediction.float(), target, reduction="none").mean(dim=-1)  # (B, T, M)
        loss = error.mean() if valid is None else self.measured_mean(error, valid, blocks.targets)
        if self.guard is not None:
            crowding = self.crowding(context[:, self.encoder.num_prefix :], self.guard)
            loss = loss + self.guard.weight * crowding
            self.log("train/guard", crowding)
        self.log("train/loss", loss)
        self.log_dict(
            {
                "health/target_std": feature_spread(target),
                "health/prediction_std": feature_spread(prediction.detach().float()),
                "health/hidden": blocks.hidden.float().mean(),
            }
        )
        return self.anchored(loss, images)

    def draw(self, batch_size: int, batch_idx: int) -> Blocks:
        """Blocks of this micro-batch, out of those of the whole step, which every process draws on the CPU."""
        first = self.first_row(batch_size, batch_idx)
        last = first + batch_size
        return sent(self.masking.blocks(self.all_rows(last), self.encoder.grid, slice(first, last)), self.device)

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """The teacher's patches of whole images, each standardised over its values: ``(B, N, D)`` float32."""
        tokens = self.evaluated(images)[:, self.encoder.num_prefix :].float()
        return F.layer_norm(tokens, tokens.shape[-1:])

    def noise(self, shape: torch.Size, generator: RowGenerator) -> Tensor | None:
        """What StoP adds to positions before they are projected, ``(B, T, M, D)``; None if nothing, or not training."""
        if self.stop is None or not self.training:
            return None
        return self.stop * generator.randn(*shape[1:])

    def predict(self, images: Tensor, blocks: Blocks, noise: Tensor | None = None) -> Tensor:
        """Features of the target blocks, ``(B, T, M, D)``, by what the context shows."""
        return self.ask(self.encode(images, blocks), blocks, noise)

    def encode(self, images: Tensor, blocks: Blocks) -> Tensor:
        """The context ``(B, P + K, D)``."""
        context: Tensor = self.encoder(images, blocks.hidden, visible_count=blocks.visible)
        return context

    def ask(self, context: Tensor, blocks: Blocks, noise: Tensor | None = None) -> Tensor:
        """Features of the target blocks, ``(B, T, M, D)``, by a context ``(B, P + K, D)``."""
        prediction: Tensor = self.predictor(
            context, visible_indices(blocks.hidden, blocks.visible), blocks.targets, noise
        )
        return prediction

    def crowding(self, context: Tensor, guard: GuardConfig) -> Tensor:
        """How far some patches of the context ``(B, K, D)`` are from standard normal over the images, a scalar."""
        generator = keyed_generator(self.plan.seed, "guard", self.global_step)
        chosen = torch.randperm(context.shape[1], generator=generator)[: guard.patches]
        directions = torch.randn(context.shape[2], guard.directions, generator=generator)
        chosen, directions = send(chosen, self.device), send(F.normalize(directions, dim=0), self.device)
        return sigreg(context[:, chosen], directions)

    def measured_mean(self, error: Tensor, valid: Tensor, targets: Tensor) -> Tensor:
        """Mean of ``error (B, T, M)`` over targets that are not mostly nodata, by ``valid (B, 1, H, W)``."""
        measured = measured_patches(valid, self.encoder.patch_size).float()  # (B, N)
        weights = measured.gather(1, targets.flatten(1)).view_as(error)
        return (error * weights).sum() / weights.sum().clamp(min=1)

    def after_optimizer_step(self, step: int) -> None:
        """Moves the teacher towards the student."""
        momentum = linear(step / self.plan.max_steps, self.first_momentum, 1.0)
        self.teacher.update(momentum, unless=self.step_was_skipped)

    def health_warning(self, values: dict[str, float]) -> str | None:
        """Names the collapse to one feature for all patches, which this loss does not forbid."""
        if values.get("health/target_std", 1.0) >= 0.05:
            return None
        return (
            "the teacher gives almost the same features to all patches: collapse. Lower the learning rate, or "
            "raise the momentum"
        )

    @torch.no_grad()
    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """The context, the target blocks, and how far off predictions are there.

        Blocks depend on the row alone, so pictures of one batch compare over training.
        """
        grid, size = self.encoder.grid, self.encoder.patch_size
        blocks = sent(self.masking.blocks(RowGenerator.for_rows(0, 0, len(images)), grid), images.device)
        target = gather_blocks(self.teach(images), blocks.targets)
        error = (self.predict(images, blocks).float() - target).abs().mean(dim=-1).flatten(1)  # (B, T * M)
        places = blocks.targets.flatten(1)
        asked = torch.zeros_like(blocks.hidden).scatter(1, places, True)
        errors = error.new_zeros(asked.shape).scatter_reduce(1, places, error, "mean", include_self=False)
        return {
            "hidden": replace_patches(
                images, size, visible_indices(~blocks.hidden, asked.shape[1] - blocks.visible), 0
            ),
            "targets": images * spread_over_pixels(asked, images, grid),
            "error": errors.view(-1, *grid),
        }


class BlockPredictor(nn.Module):
    """Says what stands at places that the encoder has not seen: its tokens and one query per place, then blocks.

    Args:
        dim: encoder width ``D``.
        grid: ``(h, w)`` patches per side.
        num_prefix: prefix tokens ``P`` of the encoder, which have no place.
        width: its own width ``E``.
        depth: number of blocks.
        heads: attention heads.
    """

    positions: Tensor

    def __init__(self, dim: int, grid: tuple[int, int], num_prefix: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.project = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.register_buffer("positions", sincos_positions(grid, width)[0], persistent=False)  # (N, E)
        self.trunk = Trunk(0, dim, width, depth, heads)

    def forward(self, context: Tensor, visible: Tensor, targets: Tensor, noise: Tensor | None = None) -> Tensor:
        """Features at ``targets (B, T, M)``: ``(B, T, M, D)``; every block is predicted on its own.

        Args:
            context: ``(B, P + K, D)`` of the encoder.
            visible: ``(B, K)`` places of its patches.
            targets: ``(B, T, M)`` places asked for.
            noise: ``(B, T, M, D)``, added to the places in the encoder's space.
        """
        blocks = targets.shape[1]
        seen = self.project(context)
        seen = seen + F.pad(F.embedding(visible, self.positions), (0, 0, self.num_prefix, 0))  # (B, P + K, E)
        queries = self.queries(targets, noise)
        sequence = torch.cat([seen[:, None].expand(-1, blocks, -1, -1), queries], dim=2).flatten(0, 1)
        asked = torch.arange(seen.shape[1], sequence.shape[1], device=sequence.device)
        prediction: Tensor = self.trunk(sequence, asked.expand(len(sequence), -1))  # (B * T, M, D)
        return prediction.reshape(-1, blocks, *prediction.shape[1:])

    def queries(self, targets: Tensor, noise: Tensor | None = None) -> Tensor:
        """Tokens ``(B, T, M, E)`` that ask for ``targets (B, T, M)``."""
        queries = self.mask_token + F.embedding(targets, self.positions)
        return queries if noise is None else queries + F.linear(noise.to(queries.dtype), self.project.weight)


def sent(blocks: Blocks, device: torch.device) -> Blocks:
    """Blocks of the CPU on ``device``."""
    return Blocks(send(blocks.hidden, device), blocks.visible, send(blocks.targets, device))


def gather_blocks(tokens: Tensor, targets: Tensor) -> Tensor:
    """Tokens ``(B, N, D)`` at ``targets (B, T, M)``: ``(B, T, M, D)``."""
    return gather_tokens(tokens, targets.flatten(1)).reshape(*targets.shape, tokens.shape[2])


def spread_over_pixels(values: Tensor, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Values ``(B, N)`` of patches as those of pixels, ``(B, 1, H, W)``."""
    return F.interpolate(values.view(-1, 1, *grid).to(images.dtype), images.shape[2:], mode="nearest")

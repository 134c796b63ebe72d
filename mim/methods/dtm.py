"""DTM: masked image modelling via dynamic token morphing (arXiv:2404.09894, 2024).

A student sees the image with patches hidden and says what a teacher makes of every patch of the whole one. Neighbouring
targets disagree for no good reason, so similar ones are joined to groups of a size drawn anew for each step, and means
of groups are compared. The teacher is a frozen ViT, or the student's own moving average.

Deviations:
    The halves of a round are split at random, as the paper writes it; no patch is kept out of the groups.
    Targets are standardised over their values, which the paper does not say of CLIP's. The teacher of its own average
    is ours, and so are its momentum and settings. Positions are the encoder's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.encoder import Encoder
from mim.layers.morphing import group_means, merge_counts, morph
from mim.layers.teacher import Teacher
from mim.masking import Masking
from mim.methods.base import Batch, Method, OptimConfig, single_view
from mim.options.ranges import Count, Share
from mim.patches import feature_spread, measured_patches
from mim.randomness import RowGenerator
from mim.schedules import cosine
from mim.targets import FeatureTarget


class DTM(Method):
    """Distillation of groups of patches whose sizes change from step to step.

    Args:
        encoder: the student.
        masking: what is hidden from the student, without guidance; the paper covers 38 % with rectangles.
        target: a frozen ViT with ``distance: smooth``; the student's moving average if not given.
        momentum: share of that average that a step keeps, at the first step; it rises to 1 along half a cosine.
        rounds: most rounds of joining; each step draws 1 to so many (14 in the paper).
        draws: sets of groups per step (2 in the paper).
        optim: learning rate, weight decay and warm-up.
    """

    masking: Masking

    def __init__(
        self,
        encoder: Encoder,
        masking: Masking,
        target: FeatureTarget | None = None,
        momentum: Share = 0.996,
        rounds: Count = 14,
        draws: Count = 2,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(encoder, masking, optim)
        if masking.guided:
            raise ValueError(f"DTM has no scores to guide {masking}; choose a policy that needs none")
        if target is not None and target.distance != "smooth":
            raise ValueError("DTM compares standardised features; set distance: smooth of its target")
        self.first_momentum, self.rounds, self.draws = momentum, rounds, draws
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, encoder.dim), std=0.02))
        self.predict = nn.Linear(encoder.dim, target.dim(encoder) if target else encoder.dim)
        self.target = target
        self.teacher = None if target else Teacher(encoder)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Smooth absolute difference of group means, each group as often as it has patches."""
        images, valid = single_view(batch)
        generator = self.row_generator(len(images), batch_idx)
        mask = self.draw_mask(generator)  # (B, N)
        target = self.teach(images)  # (B, N, C)
        tokens = self.encoder(images, mask, self.mask_token)
        prediction = self.predict(tokens[:, self.encoder.num_prefix :]).float()  # (B, N, C)
        measured = None if valid is None else measured_patches(valid, self.encoder.patch_size)
        losses = []
        for _ in range(self.draws):
            assign, groups = self.draw_groups(target, generator)
            losses.append(group_loss(prediction, target, assign, groups, measured))
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss)
        self.log_dict(
            {
                "health/target_spread": feature_spread(target),
                "health/prediction_spread": feature_spread(prediction.detach()),
            }
        )
        return self.anchored(loss, images)

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """What the teacher makes of every patch of the whole image, standardised: ``(B, N, C)`` float32."""
        if self.target is not None:
            count = self.encoder.grid[0] * self.encoder.grid[1]
            places = torch.arange(count, device=images.device).expand(len(images), -1)
            frozen: Tensor = self.target(images, self.encoder.grid, places)
            return frozen
        assert self.teacher is not None
        tokens = self.teacher.module(images)[:, self.encoder.num_prefix :]
        return F.layer_norm(tokens.float(), tokens.shape[-1:])

    def draw_groups(self, target: Tensor, generator: RowGenerator) -> tuple[Tensor, int]:
        """The group of every patch ``(B, N)``, and how many groups there are; all images of a step have as many."""
        patches = target.shape[1]
        merged, rounds = generator.common(2)  # numbers of the CPU, on [0, 1)
        counts = merge_counts(patches, int(merged * (patches + 1)), 1 + int(rounds * self.rounds))
        return morph(target, counts, generator.rand(len(counts), patches)), patches - sum(counts)

    def after_optimizer_step(self, step: int) -> None:
        """Moves the average towards the student."""
        if self.teacher is not None:
            momentum = cosine(step / self.plan.max_steps, self.first_momentum, 1.0)
            self.teacher.update(momentum, unless=self.step_was_skipped)

    def health_warning(self, values: dict[str, float]) -> str | None:
        """Tells that the teacher's features have become the same everywhere."""
        found = values.get("health/target_spread")
        if found is None or found > 0.01:
            return None
        return "the teacher says the same of all patches: collapse. Lower --blr, or take a frozen teacher as target"

    @torch.no_grad()
    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """What would be hidden, and groups of patches halfway between all apart and all together.

        Both depend on the row alone, so pictures of one batch compare over training.
        """
        grid, generator = self.encoder.grid, RowGenerator.for_rows(0, 0, len(images), images.device)
        mask = self.draw_mask(generator)
        target = self.teach(images)
        counts = merge_counts(target.shape[1], target.shape[1] * 3 // 4, 7)
        groups = morph(target, counts, generator.rand(len(counts), target.shape[1]))
        pixels = images.masked_fill(
            F.interpolate(mask.view(-1, 1, *grid).float(), images.shape[2:], mode="nearest") > 0, 0.0
        )
        return {"hidden": pixels, "groups": groups.view(-1, *grid)}


def group_loss(
    prediction: Tensor, target: Tensor, assign: Tensor, groups: int, measured: Tensor | None = None
) -> Tensor:
    """Mean over patches of the smooth absolute difference, squared below 2, of the means of their groups, a scalar.

    Args:
        prediction: ``(B, N, C)``.
        target: ``(B, N, C)``.
        assign: ``(B, N)`` the group of each patch.
        groups: how many there are.
        measured: ``(B, N)`` bool, which patches count; all if not given.
    """
    own, sizes = group_means(prediction, assign, groups, measured)
    other, _ = group_means(target, assign, groups, measured)
    error = F.smooth_l1_loss(own, other, beta=2.0, reduction="none").mean(dim=-1)  # (B, G)
    return (error * sizes).sum() / sizes.sum().clamp(min=1)

"""CAPI: cluster and predict latent patches for improved masked image modeling (arXiv:2502.08769, 2025).

A slowly moving teacher sees the whole image; its patches are put into clusters that are learned beside it, in equal
shares at every place of the grid. A student sees one rectangle, and a predictor, whose queries look at what the student
saw and never at each other, has to tell the clusters of some of the hidden patches.

Deviations:
    Positions of the queries are sine and cosine, whatever the encoder's are; the paper rotates queries and keys.
    What the predictor says is scaled to length 1 before it is compared with prototypes, as the teacher's patches are.
    The momentum rises along half a cosine. Clusters are not decayed. Their assignments are balanced within a
    micro-batch of all processes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mim.distributed.sharding import total
from mim.encoder import Encoder
from mim.layers.cross_attention import CrossDecoder
from mim.layers.initialisation import initialise
from mim.layers.prototypes import Prototypes
from mim.layers.sinkhorn import sinkhorn
from mim.layers.teacher import Teacher
from mim.masking import Masking
from mim.methods.base import Batch, Method, OptimConfig, single_view
from mim.options.ranges import Count, NotNegative, Positive, Share, SomeShare
from mim.patches import (
    feature_spread,
    gather_tokens,
    measured_mean,
    measured_patches,
    replace_patches,
    some_of,
    visible_indices,
)
from mim.randomness import RowGenerator
from mim.schedules import cosine, warmup_cosine


@dataclass(frozen=True)
class ClusterConfig:
    """The clusters of the teacher's patches, and how they learn: by themselves, with an optimizer's group of their own.

    Args:
        count: how many, ``K``; 16,384 in the paper. A place can fill no more than there are images in a batch.
        temperature: of the distributions that student and clusters learn; 0.12 in the paper.
        balanced_temperature: of the assignments that both learn from; 0.06 in the paper, lower and so sharper.
        blr: base learning rate; the one used is ``blr * global batch size / 256``. The paper's 5e-4 at 16,384 images.
        betas: averaging coefficients.
        warmup_epochs: epochs of linear warm-up from 0; never more than half of the run.
        clip: largest norm of their gradient; none if not given.
    """

    count: Count = 16384
    temperature: Positive = 0.12
    balanced_temperature: Positive = 0.06
    blr: Positive = 7.8e-6
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: NotNegative = 0.0
    clip: Positive | None = None

    def __post_init__(self) -> None:
        """Refuses what averages nothing."""
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} of the clusters cannot be")


class CAPI(Method):
    """Prediction of the clusters of hidden patches; the teacher is what is evaluated and exported.

    Args:
        encoder: the student; in the paper rotary, with 16 registers.
        masking: what is hidden, equally much of every image, without guidance; a rolled inverse block in the paper.
        clusters: how many, and how they learn.
        predictor_width: width of the predictor; the encoder's in the paper.
        predictor_depth: blocks of cross-attention; 12 in the paper.
        predictor_heads: attention heads of the predictor.
        predicted: share of the hidden patches whose clusters are asked for; a tenth, which is 5 to 7 % of all patches,
            in the paper.
        momentum: share of the teacher that a step keeps, at the first step; it rises to 1 along half a cosine.
        patch_rate: the patch embedding's learning rate over that of the rest; 0.2 in the paper.
        cosine_share: how much of the learning rates' cosine the run goes through; 0.8 in the paper.
        clip: largest norm of the gradient of all but the clusters; none if not given.
        optim: learning rate, weight decay and warm-up of all but the clusters.
    """

    masking: Masking

    def __init__(
        self,
        encoder: Encoder,
        masking: Masking,
        clusters: ClusterConfig = ClusterConfig(),
        predictor_width: Count = 768,
        predictor_depth: Count = 12,
        predictor_heads: Count = 12,
        predicted: SomeShare = 0.1,
        momentum: Share = 0.999,
        patch_rate: SomeShare = 0.2,
        cosine_share: SomeShare = 0.8,
        clip: Positive | None = None,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(encoder, masking, optim)
        self.visible_count = self.fixed_visible_count()
        self.hidden_count = math.prod(encoder.grid) - self.visible_count
        self.asked_count = max(1, round(self.hidden_count * predicted))
        self.predictor = CrossDecoder(
            encoder.dim, encoder.grid, None, predictor_width, predictor_depth, predictor_heads
        )
        initialise(self.predictor)
        self.prototypes = Prototypes(clusters.count, predictor_width, unit=False)
        self.teacher = Teacher(encoder)
        self.clusters = nn.Linear(encoder.dim, clusters.count)
        nn.init.normal_(self.clusters.weight)
        nn.init.zeros_(self.clusters.bias)
        self.clustering, self.first_momentum, self.clip = clusters, momentum, clip
        self.patch_rate, self.cosine_share = patch_rate, cosine_share

    @property
    def evaluated(self) -> Encoder:
        """The teacher."""
        encoder: Encoder = self.teacher.module
        return encoder

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of what the student predicts, plus that of the clusters, which share no gradient."""
        images, valid = single_view(batch)
        generator = self.row_generator(len(images), batch_idx)
        mask = self.draw_mask(generator)  # (B, N)
        hidden = visible_indices(~mask, self.hidden_count)
        places = some_of(hidden, self.asked_count, generator.rand(self.hidden_count))  # (B, M)
        measured = None if valid is None else measured_patches(valid, self.encoder.patch_size)  # (B, N)

        points = self.teach(images)  # (B, N, D)
        logits = self.clusters(points).float()  # (B, N, K)
        assigned = sinkhorn(logits, self.clustering.balanced_temperature, measured)
        asked = gather_tokens(assigned, places)  # (B, M, K)
        said = self.predict(images, mask, places)  # (B, M, K)
        student = self.mean_loss(said, asked, None if measured is None else measured.gather(1, places))
        clusters = self.mean_loss(logits, assigned, measured)
        self.log_dict(
            {
                "train/loss": student + clusters,
                "train/student": student,
                "train/clusters": clusters,
                "health/agreement": (said.argmax(dim=-1) == asked.argmax(dim=-1)).float().mean(),
                "health/assignment_entropy": torch.special.entr(asked).sum(dim=-1).mean() / self.most_entropy,
                "health/used": torch.special.entr(asked.mean(dim=(0, 1))).sum() / self.most_entropy,
                "health/target_std": feature_spread(points) * self.encoder.dim**0.5,
            }
        )
        return self.anchored(student + clusters, images)

    @property
    def most_entropy(self) -> float:
        """Entropy of a distribution over all clusters alike."""
        return math.log(max(2, self.clustering.count))

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """The teacher's patches of whole images, scaled to length 1: ``(B, N, D)``."""
        return F.normalize(self.evaluated(images)[:, self.encoder.num_prefix :].float(), dim=-1)

    def predict(self, images: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """Logits of clusters at ``places (B, M)``, by what ``mask (B, N)`` leaves visible: ``(B, M, K)`` float32."""
        context = self.encoder(images, mask, visible_count=self.visible_count)  # (B, P + K, D)
        points = F.normalize(self.predictor([context], places).float(), dim=-1)
        return F.linear(points, self.prototypes()).float()

    def mean_loss(self, logits: Tensor, assigned: Tensor, counted: Tensor | None) -> Tensor:
        """Mean cross-entropy of ``(B, M, K)`` logits with assignments, over patches that count, ``(B, M)``, or all."""
        error = F.cross_entropy(
            logits.flatten(0, 1) / self.clustering.temperature, assigned.flatten(0, 1), reduction="none"
        )
        return error.mean() if counted is None else measured_mean(error[:, None], counted.flatten()).sum()

    def configure_optimizers(self) -> Optimizer:
        """AdamW with the clusters in a group of their own, and a slower patch embedding."""
        optimizer = super().configure_optimizers()
        set_apart(optimizer, self.encoder.vit.patch_embed.parameters(), scale=self.patch_rate)
        set_apart(optimizer, self.clusters.parameters(), clusters=True, betas=self.clustering.betas, weight_decay=0.0)
        return optimizer

    def learning_rate(self, step: int) -> float:
        """As of any method, along a part of the cosine."""
        return self.along_cosine(step, self.warmup_steps, self.peak_lr, self.optim.min_lr)

    def group_rate(self, group: Mapping[str, Any], step: int) -> float:
        """That of the clusters has a height and a warm-up of its own."""
        if not group.get("clusters"):
            return super().group_rate(group, step)
        own, plan = self.clustering, self.plan
        warmup = round(min(own.warmup_epochs * plan.steps_per_epoch, plan.max_steps / 2))
        return self.along_cosine(step, warmup, own.blr * plan.batch_size / 256, 0.0)

    def along_cosine(self, step: int, warmup: int, peak: float, end: float) -> float:
        """A warm-up, then the first part of half a cosine from ``peak`` to ``end``."""
        return warmup_cosine(step, warmup, round(self.plan.max_steps / self.cosine_share), peak, end)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clips the clusters and the rest apart."""
        super().on_before_optimizer_step(optimizer)
        own = set(self.clusters.parameters())
        for parameters, limit in (
            (own, self.clustering.clip),
            ([parameter for parameter in self.parameters() if parameter not in own], self.clip),
        ):
            if limit is not None:
                clip_together([p.grad for p in parameters if p.grad is not None], limit)

    def after_optimizer_step(self, step: int) -> None:
        """Moves the teacher towards the student."""
        momentum = cosine(step / self.plan.max_steps, self.first_momentum, 1.0)
        self.teacher.update(momentum, unless=self.step_was_skipped)

    def health_warning(self, values: dict[str, float]) -> str | None:
        """Names a teacher that says the same of all patches, and clusters that say nothing."""
        if values.get("health/target_std", 1.0) < 0.05:
            return "the teacher gives almost the same features to all patches: collapse. Lower --blr, or raise momentum"
        if values.get("health/assignment_entropy", 0.0) > 0.99:
            return (
                "every patch belongs to all clusters alike, so there is nothing to predict. Take a larger "
                "--batch_size, or fewer clusters"
            )
        return None

    @torch.no_grad()
    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """What would be hidden, the cluster of every patch, and the cluster predicted for it from what is visible.

        Masks depend on the row alone, so pictures of one batch compare over training.
        """
        grid, generator = self.encoder.grid, RowGenerator.for_rows(0, 0, len(images), images.device)
        mask = self.draw_mask(generator)
        hidden = visible_indices(~mask, self.hidden_count)
        everywhere = torch.arange(mask.shape[1], device=images.device).expand_as(mask)
        own = self.clusters(self.teach(images)).argmax(dim=-1)  # (B, N)
        return {
            "hidden": replace_patches(images, self.encoder.patch_size, hidden, 0.0),
            "clusters": own.view(-1, *grid),
            "predicted": self.predict(images, mask, everywhere).argmax(dim=-1).view(-1, *grid),
        }


def set_apart(optimizer: Optimizer, parameters: Iterable[Tensor], scale: float = 1.0, **settings: Any) -> None:  # noqa: ANN401
    """Gives parameters groups of their own: as those that they leave, at ``scale`` times the rate, but for settings."""
    own = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in own]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            rate = group.get("lr_scale", 1.0) * scale
            optimizer.add_param_group({**group, "params": moved, "lr_scale": rate, **settings})


def clip_together(gradients: list[Tensor], limit: float) -> None:
    """Scales gradients down, in place, so that their norm over all is ``limit`` or less."""
    norm = total(torch.nn.utils.get_total_norm(gradients))
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1))

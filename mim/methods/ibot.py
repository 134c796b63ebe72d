"""iBOT: image BERT pre-training with online tokenizer (arXiv:2111.07832, 2021).

A student sees two large crops with patches hidden, and small crops. It has to give the class distribution that a
slowly moving teacher gives to the other large crop, and at hidden patches the distribution that the teacher, to whom
nothing is hidden, gives to that patch. With ``AttentionMasking`` this is AttMask (arXiv:2203.12719, 2022). With
``center: sinkhorn``, heads that share ``nothing``, KoLeo and registers it is DINOv2 (arXiv:2304.07193, 2023).

Deviations:
    Prototypes are computed for class tokens and hidden patches only; the centre of the patches needs the mean of all
    their logits, which is the logits of their mean, as the last layer is linear. The function is the same.
    Centres move once per optimizer step, by the logits of the whole global batch; the reference moves them at every
    micro-batch. Masks are drawn at the step, not in the loader, and in every epoch: the late start is Swin's alone.
    A warm-up that is longer than half of the run is cut short; its last step is not repeated.
    DINOv2 hides patches of exactly half of the images, here each is drawn; both its heads have the same sizes, and the
    patch embedding learns at the rate of the first block.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mim.distributed.collectives import sum_over_processes
from mim.distributed.devices import send
from mim.distributed.sharding import total
from mim.encoder import Encoder
from mim.layers.distillation import STUDENT_TEMPERATURE, class_loss, hidden_losses
from mim.layers.koleo import koleo
from mim.layers.prototypes import Head
from mim.layers.sinkhorn import sinkhorn
from mim.layers.teacher import Teacher
from mim.masking import Masking
from mim.methods.base import Batch, Method, OptimConfig, hidden_last
from mim.options.ranges import Count, NotNegative, Positive, Share, Whole
from mim.patches import hidden_places, measured_mean, measured_patches, measured_weights, patchify, unpatchify
from mim.randomness import RowGenerator
from mim.schedules import cosine, linear


@dataclass(frozen=True)
class HeadConfig:
    """The head that turns tokens into logits.

    Args:
        prototypes: its outputs ``K``.
        hidden: width of its two hidden layers.
        bottleneck: width of what is compared with the prototypes.
        shared: what class token and patches have in common: ``true`` for MLP and prototypes, as in the released models
            of iBOT; ``false`` for the MLP alone; ``nothing`` for two heads apart, as in DINOv2.
        unit_prototypes: prototypes keep length 1 (ViT-B and larger); else their length is learned (ViT-S).
    """

    prototypes: Count = 8192
    hidden: Count = 2048
    bottleneck: Count = 256
    shared: bool | Literal["nothing"] = True
    unit_prototypes: bool = False

    def __post_init__(self) -> None:
        """Refuses another word."""
        if self.shared not in (True, False, "nothing"):
            raise ValueError(f"a head shares true, false or nothing, not {self.shared}")


@dataclass(frozen=True)
class TeacherConfig:
    """How the teacher follows the student, and how sharp its distributions are.

    Args:
        momentum: share of the teacher that a step keeps, at the first step; it rises to 1 along half a cosine.
        start_temperature: of both distributions in the first epoch.
        temperature: of the class distribution after the warm-up.
        patch_temperature: of the patch distributions after the warm-up.
        warmup_epochs: epochs over which temperatures rise, epoch by epoch; the last one has the final value.
        center_momentum: share of the centres that a step keeps.
        center: what keeps the distributions from collapsing. ``all`` takes the moving mean of the logits of all patches
            off (iBOT). ``hidden`` takes off that of hidden patches, so the teacher's head sees no others: another
            function, and faster. ``sinkhorn`` balances class tokens, and hidden patches, over the prototypes within
            the micro-batch of all processes, without a centre (DINOv2); logits of all hidden patches are then held.
    """

    momentum: Share = 0.996
    start_temperature: Positive = 0.04
    temperature: Positive = 0.07
    patch_temperature: Positive = 0.07
    warmup_epochs: Whole = 30
    center_momentum: Share = 0.9
    center: Literal["all", "hidden", "sinkhorn"] = "all"

    def __post_init__(self) -> None:
        """Refuses another word."""
        if self.center not in ("all", "hidden", "sinkhorn"):
            raise ValueError(f"center {self.center} is none of all, hidden and sinkhorn")


@dataclass(frozen=True)
class KoLeoConfig:
    """How much class tokens keep away from each other.

    Args:
        weight: of the term, which is the sum over both large crops; DINOv2 takes 0.1, and none is computed at 0.
        neighbours: among whom the nearest is looked for: ``batch`` for the images of all processes, so that a run does
            not depend on their number; ``process`` for those of one process alone, as in DINOv2. Micro-batches of
            ``--accumulate`` are always apart.
    """

    weight: NotNegative = 0.0
    neighbours: Literal["batch", "process"] = "batch"

    def __post_init__(self) -> None:
        """Refuses another word."""
        if self.neighbours not in ("batch", "process"):
            raise ValueError(f"neighbours are those of a batch or a process, not of a {self.neighbours}")


class IBOT(Method):
    """Self-distillation with an online tokenizer; the teacher is what is evaluated and exported.

    Args:
        encoder: the student; with small crops it needs ``dynamic_img_size: true``, and ``resampling: stretched`` to be
            faithful. Drop path is the student's alone.
        masking: what is hidden of each large crop: ``BlockMasking`` (iBOT), ``VaryingRandomMasking``, or
            ``AttentionMasking`` (AttMask), which gets the teacher's attention.
        head: size of the heads.
        teacher: momentum, temperatures and centring.
        freeze_epochs: epochs in which the prototypes stand still.
        clip: largest norm of the gradient of a single parameter tensor; null leaves clipping to
            ``trainer.gradient_clip_val``, which limits the norm over all.
        optim: learning rate, weight decay and warm-up.
        koleo: what keeps the student's class tokens, before the head, apart from each other.
    """

    masking: Masking
    centers: Tensor

    def __init__(
        self,
        encoder: Encoder,
        masking: Masking,
        head: HeadConfig = HeadConfig(),
        teacher: TeacherConfig = TeacherConfig(),
        freeze_epochs: NotNegative = 1.0,
        clip: Positive | None = 3.0,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
        koleo: KoLeoConfig = KoLeoConfig(),
    ) -> None:
        super().__init__(encoder, masking, optim)
        if not encoder.has_class_token:
            raise ValueError("iBOT compares class tokens, and this encoder has none; choose a ViT with class token")
        if masking.guided and not encoder.has_class_attention:
            raise ValueError("masks follow the attention of the class token, which this encoder does not show")
        if not encoder.pretrained:
            initialise(encoder)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.dim))
        self.head = Head(encoder.dim, **vars(head))
        self.teaching, self.freeze_epochs, self.clip, self.koleo = teacher, freeze_epochs, clip, koleo
        self.teacher = Teacher(nn.ModuleDict({"encoder": self.encoder, "head": self.head}))
        # Row 0 belongs to class logits, row 1 to patch logits.
        self.register_buffer("centers", torch.zeros(2, head.prototypes), persistent=teacher.center != "sinkhorn")
        # (2, K) and how many rows each is the mean of, (2, 1), of every micro-batch; no buffers, or DDP would overwrite
        # them with rank 0's.
        self.mean_logits: list[tuple[Tensor, Tensor]] = []

    @property
    def name(self) -> str:
        """``attmask`` where the teacher's attention hides, ``dinov2`` where assignments are balanced."""
        if self.masking.guided:
            return "attmask"
        return "dinov2" if self.teaching.center == "sinkhorn" else "ibot"

    @property
    def evaluated(self) -> Encoder:
        """The teacher."""
        encoder: Encoder = self.teacher.module["encoder"]
        return encoder

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of class distributions between views, plus that of hidden patches within a view."""
        views, labels = batch[:2]
        images = torch.cat(views[:2])  # (2B, C, H, W), first view, then second
        valid = torch.cat(batch[2][:2]) if len(batch) > 2 else None  # (2B, 1, H, W)
        taught = self.teach(images, valid)
        mask = self.draw_masks(len(labels), taught.scores, batch_idx)  # (2B, N)
        image, patch, weight = hidden_places(mask, self.masking.most_hidden(mask.shape[1]))  # (M,) each
        mask, image, patch, weight = (send(values, self.device) for values in (mask, image, patch, weight))
        if taught.measured is not None:
            weight = measured_weights(weight, image, taught.measured[image, patch], len(images))
        class_targets, patch_taught = self.targets(taught, image, patch, weight)

        tokens = self.encoder(images, mask, self.mask_token)  # (2B, P + N, D)
        classes = [tokens[:, 0]]
        if views[2:]:
            classes.append(self.encoder(torch.cat(views[2:]))[:, 0])  # (V - 2) * B small crops in one batch
        hidden = tokens[image, self.encoder.num_prefix + patch]  # (M, D)
        points, hidden_points = self.head.of_both(torch.cat(classes), hidden)  # (V * B, bottleneck), (M, bottleneck)

        class_loss, class_entropy = self.class_losses(points.view(len(views), len(labels), -1), class_targets)
        patch_sum, patch_entropy = self.patch_losses(hidden_points, patch_taught, weight)
        masked = weight.sum().clamp(min=1)  # images with something hidden
        patch_loss, patch_entropy = patch_sum / len(images), patch_entropy / masked
        loss = class_loss + patch_loss
        if self.koleo.weight:
            crowding = torch.stack([koleo(crop, self.koleo.neighbours) for crop in tokens[:, 0].chunk(2)]).sum()
            loss = loss + self.koleo.weight * crowding
            self.log("train/koleo", crowding)
        scale = 1 / math.log(self.centers.shape[1])
        self.log_dict(
            {
                "train/loss": loss,
                "train/class": class_loss,
                "train/patch": patch_loss,
                "health/class_entropy": class_entropy * scale,
                "health/patch_entropy": patch_entropy * scale,
                "health/class_kl": class_loss - class_entropy,
                "health/patch_kl": patch_sum / masked - patch_entropy,
                "health/class_center": self.centers[0].norm(),
                "health/patch_center": self.centers[1].norm(),
                "health/hidden": mask.float().mean(),
            }
        )
        return self.anchored(loss, images)

    @torch.no_grad()
    def teach(self, images: Tensor, valid: Tensor | None = None) -> "Taught":
        """What the teacher makes of large crops, and where it looks if the masks follow that.

        Args:
            images: ``(2B, C, H, W)``.
            valid: ``(2B, 1, H, W)`` bool, which pixels were measured; all if not given.
        """
        encoder = self.evaluated
        measured = None if valid is None else measured_patches(valid, encoder.patch_size)  # (2B, N)
        if not self.masking.guided:
            return Taught(encoder(images), None, measured)
        tokens, scores = encoder.forward_with_attention(images)
        return Taught(tokens, hidden_last(scores, valid, encoder), measured)

    @torch.no_grad()
    def targets(self, taught: "Taught", image: Tensor, patch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What the student is to say; mean logits are kept for the centres, if there are any.

        Args:
            taught: the teacher's tokens.
            image: ``(M,)`` of every hidden patch.
            patch: ``(M,)`` its place.
            weight: ``(M,)``, 0 for a row that only fills.

        Returns:
            Distributions of class tokens ``(2B, K)``, and of hidden patches ``(M, bottleneck)``, what the teacher's
            prototypes are to be compared with chunk by chunk; with ``sinkhorn`` their distributions ``(M, K)``.
        """
        head, prefix = self.teacher.module["head"], self.encoder.num_prefix
        classes = F.linear(head(taught.tokens[:, 0]), head.for_classes()).float()  # (2B, K)
        temperature = self.temperature(self.teaching.temperature)
        if self.teaching.center == "sinkhorn":
            points = head.of_patches(taught.tokens[image, prefix + patch])  # (M, bottleneck)
            logits, sharpness = F.linear(points, head.for_patches()), self.temperature(self.teaching.patch_temperature)
            return sinkhorn(classes, temperature), sinkhorn(logits, sharpness, weight > 0)
        if self.teaching.center == "hidden":
            points, counted = head.of_patches(taught.tokens[image, prefix + patch]), weight > 0
            self.note_logits(classes, measured_mean(points.float(), counted), counted.sum())
        else:
            patches, measured = head.of_patches(taught.tokens[:, prefix:]), taught.measured  # (2B, N, bottleneck)
            middle = patches.float().mean(dim=(0, 1)) if measured is None else measured_mean(patches.float(), measured)
            self.note_logits(classes, middle, middle.new_ones(()))
            points = patches[image, patch]
        return ((classes - self.centers[0]) / temperature).softmax(dim=-1), points

    def note_logits(self, classes: Tensor, middle: Tensor, count: Tensor) -> None:
        """Keeps mean logits for the centres.

        The last layer is linear: the mean of the logits of patches is the logits of their mean.

        Args:
            classes: ``(2B, K)`` logits.
            middle: ``(bottleneck,)``, the mean over patches.
            count: scalar, how much that mean counts beside those of other micro-batches and processes.
        """
        mean = (self.teacher.module["head"].for_patches() * middle).sum(dim=1)  # (K,); in fp32 under autocast, too
        counts = torch.stack([torch.ones_like(count), count]).float()[:, None]
        self.mean_logits.append((torch.stack([classes.mean(dim=0), mean]), counts))

    def draw_masks(self, batch_size: int, scores: Tensor | None, batch_idx: int) -> Tensor:
        """``(2B, N)``; drawn on the CPU where nothing of the device is needed, since their sizes are then known."""
        device = torch.device("cpu") if scores is None else scores.device
        generator = self.row_generator(batch_size, batch_idx, device).views(2)
        return self.draw_mask(generator, scores)

    def class_losses(self, points: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over all pairs of different views, and the mean entropy of the teacher.

        Args:
            points: ``(V, B, bottleneck)`` of the student's class tokens, the two large views first.
            targets: ``(2B, K)`` distributions of the teacher.
        """
        logits = F.linear(points, self.head.for_classes()).float() / STUDENT_TEMPERATURE  # (V, B, K)
        targets = targets.view(2, *logits.shape[1:])  # (2, B, K)
        return class_loss(targets, logits), torch.special.entr(targets).sum(dim=-1).mean()

    def patch_losses(self, points: Tensor, taught: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over hidden patches of weight x cross-entropy, and of weight x entropy of the teacher.

        Args:
            points: ``(M, bottleneck)`` of the student.
            taught: what :meth:`targets` says of the same patches.
            weight: ``(M,)``.
        """
        other = self.teacher.module["head"].for_patches()
        soften = partial(self.soften, other) if self.teaching.center != "sinkhorn" else lambda assignments: assignments
        return hidden_losses(points, self.head.for_patches(), taught, soften, weight)

    def soften(self, prototypes: Tensor, taught: Tensor) -> Tensor:
        """Points ``(chunk, bottleneck)`` of the teacher to distributions ``(chunk, K)``."""
        temperature = self.temperature(self.teaching.patch_temperature)
        return ((F.linear(taught, prototypes).float() - self.centers[1]) / temperature).softmax(dim=-1)

    def temperature(self, final: float) -> float:
        """The teacher's temperature in this epoch."""
        epoch, epochs = self.plan.epoch(self.global_step), self.teaching.warmup_epochs
        if epoch >= epochs:
            return final
        return linear(epoch / max(1, epochs - 1), self.teaching.start_temperature, final)

    def momentum(self, step: int) -> float:
        """Share of the teacher that is kept after the step that follows ``step`` finished ones."""
        return cosine(step / self.plan.max_steps, self.teaching.momentum, 1.0)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clips, and takes the prototypes out of the step, decay included, as long as they are frozen."""
        super().on_before_optimizer_step(optimizer)
        if self.clip is not None:
            clip_each([p.grad for p in self.parameters() if p.grad is not None], self.clip)
        if self.global_step < self.freeze_epochs * self.plan.steps_per_epoch:
            for parameter in self.head.prototypes.parameters():
                parameter.grad = None

    def after_optimizer_step(self, step: int) -> None:
        """Moves centres and teacher."""
        if self.mean_logits:
            self.move_centers()
        self.teacher.update(self.momentum(step), unless=self.step_was_skipped)

    @torch.no_grad()
    def move_centers(self) -> None:
        """Towards the mean logits of the step; ranks and micro-batches hold equally many images."""
        sums = torch.stack([torch.cat([mean * count, count], dim=1) for mean, count in self.mean_logits]).sum(dim=0)
        self.mean_logits.clear()
        sums, count = sum_over_processes(sums).tensor_split([-1], dim=1)  # (2, K), (2, 1)
        stays = self.step_was_skipped | (count == 0)
        self.centers.lerp_(torch.where(stays, self.centers, sums / count), 1 - self.teaching.center_momentum)

    def health_warning(self, values: dict[str, float]) -> str | None:
        """Names the two ways to collapse (DINO, arXiv:2104.14294, sec. 5.3) once the student follows everywhere."""
        entropy, divergence = values.get("health/class_entropy"), values.get("health/class_kl")
        if entropy is None or divergence is None or divergence > 0.05:
            return None
        if entropy > 0.99:
            return (
                "the teacher's class distribution is uniform for all images: collapse by centring. Lower the teacher's "
                "temperature, or the learning rate"
            )
        if entropy < 0.01:
            return (
                "the teacher gives all images the same prototype: collapse by sharpening. Raise the teacher's "
                "temperature, lower center_momentum, or lengthen the warm-up of the learning rate"
            )
        return None

    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """What would be hidden, where three heads of the teacher look, and the prototype nearest to each patch.

        Masks depend on the row alone, so pictures of one batch compare over training.
        """
        grid, head = self.encoder.grid, self.teacher.module["head"]
        shown = self.evaluated.has_class_attention
        attention = self.evaluated.head_attention(images) if shown else images.new_empty(0)  # (B, heads, N)
        scores = attention.mean(dim=1) if self.masking.guided else None
        generator = RowGenerator.for_rows(0, 0, len(images), images.device)
        mask = self.draw_mask(generator, scores)
        patches = patchify(images, self.encoder.patch_size).masked_fill(mask[..., None], 0.0)
        pictures = {"hidden": unpatchify(patches, grid, self.encoder.patch_size, self.encoder.in_chans)}
        for number, values in enumerate(attention[:, :3].unbind(1) if shown else (), start=1):
            pictures[f"head {number}"] = values.view(-1, *grid)
        points = head.of_patches(self.evaluated(images)[:, self.encoder.num_prefix :])
        logits = F.linear(points, head.for_patches()) - self.centers[1]  # (B, N, K)
        return pictures | {"clusters": logits.argmax(dim=-1).view(-1, *grid)}


@dataclass(frozen=True)
class Taught:
    """What the teacher makes of the large crops.

    Args:
        tokens: ``(2B, P + N, D)``.
        scores: ``(2B, N)`` attention, for guided policies only.
        measured: ``(2B, N)`` bool, False for patches that are mostly nodata; None if all of all images was measured.
    """

    tokens: Tensor
    scores: Tensor | None
    measured: Tensor | None = None


def clip_each(gradients: list[Tensor], limit: float) -> None:
    """Scales every gradient whose own norm exceeds ``limit`` down to it, in place."""
    norms = total(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp(max=1).unbind()))


def initialise(encoder: Encoder) -> None:
    """Tokens and positions as in the reference; timm draws the rest in the same way."""
    for parameter in (encoder.vit.cls_token, encoder.vit.pos_embed):
        if parameter is not None and parameter.requires_grad:
            nn.init.trunc_normal_(parameter, std=0.02)

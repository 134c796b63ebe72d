"""iBOT: image BERT pre-training with online tokenizer (arXiv:2111.07832, 2021).

A student sees two large crops with patches hidden, and small crops. It has to give the class distribution that a
slowly moving teacher gives to the other large crop, and at hidden patches the distribution that the teacher, to whom
nothing is hidden, gives to that patch. With ``AttentionMasking`` this is AttMask (arXiv:2203.12719, 2022).

Deviations:
    Prototypes are computed for class tokens and hidden patches only; the centre of the patches needs the mean of all
    their logits, which is the logits of their mean, as the last layer is linear. The function is the same.
    Centres move once per optimizer step, by the logits of the whole global batch; the reference moves them at every
    micro-batch. Masks are drawn at the step, not in the loader, and in every epoch: the late start is Swin's alone.
    A warm-up that is longer than half of the run is cut short; its last step is not repeated.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from mim.distributed.devices import send
from mim.distributed.sharding import total
from mim.encoder import Encoder
from mim.layers.teacher import Teacher
from mim.masking import Masking
from mim.methods.base import Batch, Method, OptimConfig, hidden_last
from mim.options.ranges import Count, NotNegative, Positive, Share, Whole
from mim.patches import measured_patches, patchify, unpatchify
from mim.randomness import RowGenerator
from mim.schedules import cosine, linear

STUDENT_TEMPERATURE = 0.1
CHUNK = 2048  # patches whose logits are held at once: 64 MiB in fp32 for 8192 prototypes


@dataclass(frozen=True)
class HeadConfig:
    """The head that turns tokens into logits.

    Args:
        prototypes: its outputs ``K``.
        hidden: width of its two hidden layers.
        bottleneck: width of what is compared with the prototypes.
        shared: one set of prototypes for class token and patches, as in the released models; else two.
        unit_prototypes: prototypes keep length 1 (ViT-B and larger); else their length is learned (ViT-S).
    """

    prototypes: Count = 8192
    hidden: Count = 2048
    bottleneck: Count = 256
    shared: bool = True
    unit_prototypes: bool = False


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
    """

    momentum: Share = 0.996
    start_temperature: Positive = 0.04
    temperature: Positive = 0.07
    patch_temperature: Positive = 0.07
    warmup_epochs: Whole = 30
    center_momentum: Share = 0.9


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
    ) -> None:
        super().__init__(encoder, masking, optim)
        if not encoder.has_class_token:
            raise ValueError("iBOT compares class tokens, and this encoder has none; choose a ViT with class token")
        if masking.guided and not encoder.has_class_attention:
            raise ValueError("masks follow the attention of the class token, which this encoder does not show")
        if not encoder.pretrained:
            initialise(encoder)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.dim))
        self.head = Head(encoder.dim, head)
        self.teaching, self.freeze_epochs, self.clip = teacher, freeze_epochs, clip
        self.teacher = Teacher(nn.ModuleDict({"encoder": self.encoder, "head": self.head}))
        # Row 0 belongs to class logits, row 1 to patch logits.
        self.register_buffer("centers", torch.zeros(2, head.prototypes))
        self.mean_logits: list[
            Tensor
        ] = []  # (2, K) of every micro-batch; no buffer, or DDP would overwrite it with rank 0's

    @property
    def name(self) -> str:
        """``attmask`` where the teacher's attention chooses what is hidden."""
        return "attmask" if self.masking.guided else "ibot"

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

        tokens = self.encoder(images, mask, self.mask_token)  # (2B, P + N, D)
        classes = [tokens[:, 0]]
        if views[2:]:
            classes.append(self.encoder(torch.cat(views[2:]))[:, 0])  # (V - 2) * B small crops in one batch
        hidden = tokens[image, self.encoder.num_prefix + patch]  # (M, D)
        points = self.head(torch.cat([*classes, hidden]))  # (V * B + M, bottleneck)

        count = len(points) - len(hidden)
        on_class = self.class_losses(points[:count].view(len(views), len(labels), -1), taught.classes)
        on_patch = self.patch_losses(points[count:], taught.patches[image, patch], weight)
        masked = weight.sum().clamp(min=1)  # images with something hidden
        class_loss, class_entropy = on_class
        patch_loss, patch_entropy = on_patch[0] / len(images), on_patch[1] / masked
        loss = class_loss + patch_loss
        scale = 1 / math.log(self.centers.shape[1])
        self.log_dict(
            {
                "train/loss": loss,
                "train/class": class_loss,
                "train/patch": patch_loss,
                "health/class_entropy": class_entropy * scale,
                "health/patch_entropy": patch_entropy * scale,
                "health/class_kl": class_loss - class_entropy,
                "health/patch_kl": on_patch[0] / masked - patch_entropy,
                "health/class_center": self.centers[0].norm(),
                "health/patch_center": self.centers[1].norm(),
                "health/hidden": mask.float().mean(),
            }
        )
        return self.anchored(loss, images)

    @torch.no_grad()
    def teach(self, images: Tensor, valid: Tensor | None = None) -> "Taught":
        """What the teacher says of large crops; its mean logits are kept for the centres.

        Args:
            images: ``(2B, C, H, W)``.
            valid: ``(2B, 1, H, W)`` bool, which pixels were measured; all if not given.
        """
        encoder, head = self.evaluated, self.teacher.module["head"]
        scores = None
        if self.masking.guided:
            tokens, scores = encoder.forward_with_attention(images)
            scores = hidden_last(scores, valid, encoder)
        else:
            tokens = encoder(images)  # (2B, P + N, D)
        classes = F.linear(head(tokens[:, 0]), head.for_classes()).float()  # (2B, K)
        patches = head(tokens[:, encoder.num_prefix :])  # (2B, N, bottleneck)
        # The last layer is linear: the mean of the logits of all patches is the logits of their mean.
        measured = None if valid is None else measured_patches(valid, encoder.patch_size)  # (2B, N)
        middle = patches.float().mean(dim=(0, 1)) if measured is None else measured_mean(patches.float(), measured)
        mean = (head.for_patches() * middle).sum(dim=1)  # (K,); in fp32 under autocast, too
        self.mean_logits.append(torch.stack([classes.mean(dim=0), mean]))
        return Taught(classes, patches, scores, measured)

    def draw_masks(self, batch_size: int, scores: Tensor | None, batch_idx: int) -> Tensor:
        """``(2B, N)``; drawn on the CPU where nothing of the device is needed, since their sizes are then known."""
        device = torch.device("cpu") if scores is None else scores.device
        generator = self.row_generator(batch_size, batch_idx, device).views(2)
        mask: Tensor = self.masking(
            2 * batch_size, self.encoder.grid, scores=scores, progress=self.progress, generator=generator
        )
        return mask

    def class_losses(self, points: Tensor, taught: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over all pairs of different views, and the mean entropy of the teacher.

        Args:
            points: ``(V, B, bottleneck)`` of the student's class tokens, the two large views first.
            taught: ``(2B, K)`` logits of the teacher.
        """
        logits = F.linear(points, self.head.for_classes()).float() / STUDENT_TEMPERATURE  # (V, B, K)
        temperature = self.temperature(self.teaching.temperature)
        targets = ((taught - self.centers[0]) / temperature).softmax(dim=-1).view(2, *logits.shape[1:])  # (2, B, K)
        return class_loss(targets, logits), torch.special.entr(targets).sum(dim=-1).mean()

    def patch_losses(self, points: Tensor, taught: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over hidden patches of weight x cross-entropy, and of weight x entropy of the teacher.

        Logits of a chunk are computed again in the backward pass instead of being kept.

        Args:
            points: ``(M, bottleneck)`` of the student.
            taught: ``(M, bottleneck)`` of the teacher.
            weight: ``(M,)``.
        """
        own, other = self.head.for_patches(), self.teacher.module["head"].for_patches()
        temperature = self.temperature(self.teaching.patch_temperature)

        def losses(points: Tensor, taught: Tensor, weight: Tensor) -> Tensor:
            logits = F.linear(points, own).float() / STUDENT_TEMPERATURE  # (chunk, K)
            with torch.no_grad():
                targets = ((F.linear(taught, other).float() - self.centers[1]) / temperature).softmax(dim=-1)
                entropy = torch.special.entr(targets).sum(dim=-1)
            return torch.stack([(weight * cross_entropy(targets, logits)).sum(), (weight * entropy).sum()])

        chunks = zip(*(torch.split(values, CHUNK) for values in (points, taught, weight)), strict=True)
        sums = [checkpoint(losses, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        total, entropy = torch.stack(sums).sum(dim=0)
        return total, entropy.detach()

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
        self.move_centers()
        self.teacher.update(self.momentum(step), unless=self.step_was_skipped)

    @torch.no_grad()
    def move_centers(self) -> None:
        """Towards the mean logits of the step; ranks and micro-batches hold equally many images."""
        mean = torch.stack(self.mean_logits).mean(dim=0)  # (2, K)
        self.mean_logits.clear()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        mean = torch.where(self.step_was_skipped, self.centers, mean)
        self.centers.lerp_(mean, 1 - self.teaching.center_momentum)

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
        mask = self.masking(len(images), grid, scores=scores, progress=self.progress, generator=generator)
        patches = patchify(images, self.encoder.patch_size).masked_fill(mask[..., None], 0.0)
        pictures = {"hidden": unpatchify(patches, grid, self.encoder.patch_size, self.encoder.in_chans)}
        for number, values in enumerate(attention[:, :3].unbind(1) if shown else (), start=1):
            pictures[f"head {number}"] = values.view(-1, *grid)
        points = head(self.evaluated(images)[:, self.encoder.num_prefix :])
        logits = F.linear(points, head.for_patches()) - self.centers[1]  # (B, N, K)
        return pictures | {"clusters": logits.argmax(dim=-1).view(-1, *grid)}


@dataclass(frozen=True)
class Taught:
    """What the teacher says of the large crops.

    Args:
        classes: ``(2B, K)`` logits of the class tokens.
        patches: ``(2B, N, bottleneck)``, what is compared with the prototypes.
        scores: ``(2B, N)`` attention, for guided policies only.
        measured: ``(2B, N)`` bool, False for patches that are mostly nodata; None if all of all images was measured.
    """

    classes: Tensor
    patches: Tensor
    scores: Tensor | None
    measured: Tensor | None = None


class Head(nn.Module):
    """Tokens to points on a sphere, and the prototypes that they are compared with.

    Args:
        dim: width of a token.
        config: sizes.
    """

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, config.bottleneck),
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.prototypes = nn.ModuleList(Prototypes(config) for _ in range(1 if config.shared else 2))

    def forward(self, tokens: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., bottleneck)`` of length 1; logits are their products with the prototypes."""
        return F.normalize(self.mlp(tokens), dim=-1)

    def for_classes(self) -> Tensor:
        """Prototypes of the class token, ``(K, bottleneck)``."""
        prototypes: Tensor = self.prototypes[0]()
        return prototypes

    def for_patches(self) -> Tensor:
        """Prototypes of patches, ``(K, bottleneck)``."""
        prototypes: Tensor = self.prototypes[-1]()
        return prototypes


class Prototypes(nn.Module):
    """Rows with a direction and a length, learned apart.

    Args:
        config: sizes, and whether lengths stay 1.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        bound = config.bottleneck**-0.5
        self.direction = nn.Parameter(torch.empty(config.prototypes, config.bottleneck).uniform_(-bound, bound))
        self.length = nn.Parameter(torch.ones(config.prototypes, 1), requires_grad=not config.unit_prototypes)

    def forward(self) -> Tensor:
        """``(K, bottleneck)``."""
        return self.length * F.normalize(self.direction, dim=1)


def class_loss(targets: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy of student views with all other teacher views, mean over images and pairs.

    Args:
        targets: ``(2, B, K)`` distributions of the teacher for the two large views.
        logits: ``(V, B, K)`` of the student, divided by its temperature; views 0 and 1 are those of the teacher.
    """
    pairs = logits.logsumexp(dim=-1) - torch.stack([(target * logits).sum(dim=-1) for target in targets])  # (2, V, B)
    different = ~torch.eye(2, len(logits), dtype=torch.bool, device=logits.device)
    return (pairs.mean(dim=-1) * different).sum() / (2 * len(logits) - 2)


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """``(M, K)`` distributions and ``(M, K)`` logits to ``(M,)``; distributions sum to 1."""
    return logits.logsumexp(dim=-1) - (targets * logits).sum(dim=-1)


def hidden_places(mask: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, patch and weight of every hidden patch; weights are 1 / (hidden patches of the same image).

    Args:
        mask: ``(B, N)`` bool. On the CPU its hidden patches are counted; anywhere else that would make the CPU wait,
            and every image gets ``most`` places, those that are not hidden with weight 0.
        most: no image hides more.

    Returns:
        ``(M,)`` each.
    """
    if mask.device.type == "cpu":
        image, patch = mask.nonzero(as_tuple=True)
        return image, patch, 1 / mask.sum(dim=1)[image]
    return padded_places(mask, most)


def measured_weights(weight: Tensor, image: Tensor, measured: Tensor, images: int) -> Tensor:
    """``weight (M,)`` of hidden places, 0 where the patch is mostly nodata; those of an image sum to 1 again, or to 0.

    Args:
        weight: as :func:`hidden_places` gives it.
        image: ``(M,)``.
        measured: ``(M,)`` bool.
        images: how many there are.
    """
    kept = weight * measured
    total = kept.new_zeros(images).index_add(0, image, kept)
    return kept / total[image].clamp(min=1e-6)


def measured_mean(patches: Tensor, measured: Tensor) -> Tensor:
    """Mean ``(D,)`` of ``(B, N, D)`` over the places where ``measured (B, N)`` is True."""
    return (patches * measured[..., None]).sum(dim=(0, 1)) / measured.sum().clamp(min=1)


def padded_places(mask: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`hidden_places`, with ``most`` places for every image, ``M = B * most``, whatever it hides."""
    places = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, most)
    image = torch.arange(len(mask), device=mask.device)[:, None].expand_as(places)
    weight = mask.gather(1, places) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return image.flatten(), places.flatten(), weight.flatten()


def clip_each(gradients: list[Tensor], limit: float) -> None:
    """Scales every gradient whose own norm exceeds ``limit`` down to it, in place."""
    norms = total(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp(max=1).unbind()))


def initialise(encoder: Encoder) -> None:
    """Tokens and positions as in the reference; timm draws the rest in the same way."""
    for parameter in (encoder.vit.cls_token, encoder.vit.pos_embed):
        if parameter is not None and parameter.requires_grad:
            nn.init.trunc_normal_(parameter, std=0.02)

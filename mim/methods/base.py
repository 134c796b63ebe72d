"""What every pretraining method shares: optimizer, position in the run, keyed randomness, the guard against NaN."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import lightning as L
import torch
import torch.distributed
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import Optimizer

from mim.conv_encoder import ConvEncoder
from mim.distributed.sharding import shard, total
from mim.encoder import Encoder
from mim.errors import UserError
from mim.layers.anchor import AnchorConfig, feature_distance, gram_distance, weight_distance
from mim.layers.teacher import Teacher
from mim.masking.base import Masking
from mim.options.ranges import Positive, ShareBelowOne, SomeShare
from mim.patches import measured_patches
from mim.randomness import RowGenerator, derive_seed
from mim.schedules import cosine, warmup_cosine
from mim.vit import ViT

Batch = tuple[list[Tensor], Tensor] | tuple[list[Tensor], Tensor, list[Tensor]]
"""Views, ``V x (B, C, H_v, W_v)`` with global crops first, and labels ``(B,)``, which most methods ignore.

Where images have nodata, a third part ``V x (B, 1, H_v, W_v)`` bool says which pixels were measured; others are 0.
"""


def single_view(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The only view ``(B, C, H, W)`` of a batch, and ``(B, 1, H, W)`` which of its pixels were measured, if not all."""
    (images,) = batch[0]
    return images, batch[2][0] if len(batch) > 2 else None


def hidden_last(scores: Tensor, valid: Tensor | None, encoder: Encoder) -> Tensor:
    """Scores ``(B, N)`` by which patches that are mostly nodata are the last to be hidden.

    Args:
        scores: of patches.
        valid: ``(B, 1, H, W)`` bool, which pixels were measured; all if not given.
        encoder: whose patches they are.
    """
    if valid is None:
        return scores
    return scores.masked_fill(~measured_patches(valid, encoder.patch_size), -torch.inf)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and half-cosine decay, both per step (MAE, arXiv:2111.06377, table 8).

    Args:
        blr: base learning rate; the one used is ``blr * global batch size / 256``.
        weight_decay: for everything but biases and normalisation; learned tokens decay as in the reference.
        weight_decay_end: weight decay at the last step, reached along half a cosine; it stays constant if not given.
        betas: AdamW's averaging coefficients.
        warmup_epochs: epochs of linear warm-up from 0; never more than half of the run.
        min_lr: learning rate at the last step.
        head_warmup: share of the steps in which the encoder stands still and all else learns, for encoders that are
            good already; then its learning rate rises from 0 over ``warmup_epochs``.
        layer_decay: the encoder's learning rate falls by this factor from block to block, from the last one down.
        anchor: what keeps the encoder near its start.
    """

    blr: Positive = 1.5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: float = 40.0
    min_lr: float = 0.0
    weight_decay_end: float | None = None
    head_warmup: ShareBelowOne = 0.0
    layer_decay: SomeShare = 1.0
    anchor: AnchorConfig = AnchorConfig()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        """Refuses rates that cannot be, and a schedule that no group would follow."""
        if not 0 < self.blr < 1e6 or not 0 <= self.min_lr < 1e6 or not 0 <= self.weight_decay < 1e6:
            raise ValueError(f"blr {self.blr}, min_lr {self.min_lr} or weight_decay {self.weight_decay} cannot be")
        if not all(0 <= beta < 1 for beta in self.betas) or not self.warmup_epochs >= 0:
            raise ValueError(f"betas {self.betas} or warmup_epochs {self.warmup_epochs} cannot be")
        if self.weight_decay_end is not None and self.weight_decay <= 0:
            raise ValueError(f"a weight decay that moves to {self.weight_decay_end} must start above 0")


@dataclass(frozen=True)
class Plan:
    """The length of a run, known before its first step.

    Args:
        max_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps in which every image is seen once; rarely whole.
        batch_size: global batch size: devices x accumulation x images per device.
        seed: of everything random in the run.
        asked: passes over the data that were asked for; whole steps may make a little more or less of them.
    """

    max_steps: int = 1
    steps_per_epoch: float = 1.0
    batch_size: int = 256
    seed: int = 0
    asked: float | None = None

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return self.asked or self.max_steps / self.steps_per_epoch

    def epoch(self, step: int) -> int:
        """Whole passes over the data after ``step`` steps.

        ``steps_per_epoch`` is images / batch size, rounded to a float; the fraction that it stands for is looked for
        again, so that the last step of a pass is never counted to the pass before.
        """
        return int(step / Fraction(self.steps_per_epoch).limit_denominator())

    def passes(self, step: int) -> float:
        """Passes over the data after ``step`` steps: a whole number where that is less than a step away."""
        exact = step / self.max_steps * self.epochs
        whole = round(exact)
        return float(whole) if abs(exact - whole) * self.max_steps < self.epochs * (1 - 1e-9) else exact

    def epochs_at(self, step: int) -> str:
        """Passes over the data after ``step`` steps, as precisely as the length of the run deserves."""
        return f"{step / self.max_steps * self.epochs:.{0 if self.epochs >= 20 else 1 if self.epochs >= 2 else 2}f}"


class NonFiniteError(Exception):
    """A loss or gradient was NaN or infinite; the optimizer skipped that step.

    Args:
        step: optimizer steps finished before the bad one.
        what: the loss terms or the tensor that it was found in.

    Attributes:
        names: files of its batch, for whoever has found them out.
    """

    names: Sequence[str] = ()

    def __init__(self, step: int, what: str = "the gradient") -> None:
        super().__init__(f"not finite at step {step + 1}: {what}")
        self.step = step


class Method(L.LightningModule):
    """A pretraining method: subclasses build their parts in ``__init__`` and write ``training_step(batch, batch_idx)``.

    Args:
        encoder: the student; what is exported unless the method says otherwise.
        masking: the policy that hides patches; None for a method that has several, or none.
        optim: learning rate, weight decay and warm-up.
    """

    nonfinite_step: Tensor
    skip_step: Tensor

    masking: Masking | None

    def __init__(self, encoder: Encoder | ConvEncoder, masking: Masking | None, optim: OptimConfig) -> None:
        super().__init__()
        self.kind = type(self).__name__  # sharding gives the object a class of its own
        self.encoder = cast(Encoder, encoder)  # what is used of it here and in shared code is the same in both families
        self.masking = masking
        if masking is not None:
            masking.fit(encoder.grid)
        self.optim = optim
        self.plan = Plan()
        self.start = Teacher(self.encoder) if optim.anchor.holds else None  # which never moves
        self._held: list[nn.Parameter] = []  # parameters of the encoder that stand still at this step
        # First step with a non-finite gradient, -1 if none; on the device, so that setting it needs no synchronisation.
        self.register_buffer("nonfinite_step", torch.tensor(-1), persistent=False)
        self.register_buffer("skip_step", torch.tensor(False), persistent=False)  # see skip_step_unless_finite

    @property
    def name(self) -> str:
        """What runs, folders and reports call the method."""
        return self.kind.lower()

    @property
    def evaluated(self) -> Encoder:
        """What probes measure and pictures show: the student, unless the paper evaluates the teacher."""
        return self.encoder

    @property
    def backbone(self) -> ViT:
        """What export writes."""
        return self.evaluated.vit

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return self.global_step / self.plan.max_steps

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up."""
        return self.optim.blr * self.plan.batch_size / 256

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up; a run too short for its warm-up spends half of its steps there."""
        return round(min(self.optim.warmup_epochs * self.plan.steps_per_epoch, self.plan.max_steps / 2))

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step that follows ``step`` finished ones."""
        return warmup_cosine(step, self.warmup_steps, self.plan.max_steps, self.peak_lr, self.optim.min_lr)

    def weight_decay(self, step: int) -> float:
        """Weight decay of the step that follows ``step`` finished ones."""
        end = self.optim.weight_decay_end
        return cosine(
            step / self.plan.max_steps, self.optim.weight_decay, self.optim.weight_decay if end is None else end
        )

    @property
    def held_steps(self) -> int:
        """Steps in which the encoder stands still."""
        return round(self.optim.head_warmup * self.plan.max_steps)

    def encoder_share(self, step: int) -> float:
        """Share of its learning rate that the encoder has in the step that follows ``step`` finished ones."""
        if not self.held_steps:
            return 1.0
        return min(1.0, max(0, step + 1 - self.held_steps) / max(1, self.warmup_steps))

    def group_rate(self, group: Mapping[str, Any], step: int) -> float:
        """Learning rate of one group of the optimizer in the step that follows ``step`` finished ones."""
        share = self.encoder_share(step) if group.get("encoder") else 1.0
        return self.learning_rate(step) * float(group.get("lr_scale", 1.0)) * share

    def anchored(self, loss: Tensor, images: Tensor) -> Tensor:
        """The loss of a step with what keeps the encoder near its start; ``loss`` itself if nothing does.

        Args:
            loss: a scalar.
            images: ``(B, C, H, W)`` that the features of both are compared on.
        """
        anchor = self.optim.anchor
        if self.start is None or self.global_step < self.held_steps:
            return loss
        held = loss.new_zeros(())
        if anchor.weights:
            pairs = [pair for pair in zip(self.encoder.parameters(), self.start.module.parameters(), strict=True)]
            learning = [pair for pair in pairs if pair[0].requires_grad]
            held = held + anchor.weights * weight_distance(*zip(*learning, strict=True))
        if anchor.looks:
            own = self.encoder.feature_map(images).flatten(2).transpose(1, 2)  # (B, N, D)
            with torch.no_grad():
                other = self.start.module.feature_map(images).flatten(2).transpose(1, 2)
            held = held + anchor.gram * gram_distance(own, other) + anchor.features * feature_distance(own, other)
        self.log("train/anchor", held.detach())
        return loss + held

    def first_row(self, batch_size: int, batch_idx: int) -> int:
        """Place of this micro-batch's first image in the global batch of its step."""
        trainer = self._trainer
        if trainer is None:
            return 0
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        return (micro_batch * trainer.world_size + trainer.global_rank) * batch_size

    def row_generator(self, batch_size: int, batch_idx: int, device: torch.device | str | None = None) -> RowGenerator:
        """Random numbers for the images of this micro-batch: a function of seed, step and place in the global batch.

        They are drawn on ``device``, by default the method's.
        """
        seed = derive_seed(self.plan.seed, "rows", self.global_step)
        return RowGenerator.for_rows(seed, self.first_row(batch_size, batch_idx), batch_size, device or self.device)

    def all_rows(self, least: int = 0) -> RowGenerator:
        """Random numbers for all images of a step, on the CPU: those of other processes and micro-batches, too.

        What every process has to know of all of them is drawn everywhere, and nobody waits for it.

        Args:
            least: rows wanted at least, where a batch is larger than the plan says.
        """
        seed = derive_seed(self.plan.seed, "all rows", self.global_step)
        return RowGenerator.for_rows(seed, 0, max(self.plan.batch_size, least))

    def draw_mask(self, generator: RowGenerator, scores: Tensor | None = None) -> Tensor:
        """What the policy hides at this point of the run: ``(B, N)``, True = hidden.

        Args:
            generator: random numbers of the ``B`` images.
            scores: ``(B, N)`` that a guided policy hides by.
        """
        assert self.masking is not None
        mask: Tensor = self.masking(
            len(generator), self.encoder.grid, scores=scores, progress=self.progress, generator=generator
        )
        return mask

    def health_warning(self, values: dict[str, float]) -> str | None:
        """What is wrong, and why, judged by the newest numbers that the method logged; None if nothing is."""
        return None

    def fixed_visible_count(self, guides: bool = False) -> int:
        """How many patches of every image stay visible.

        Args:
            guides: whether the method has scores for a policy.

        Raises:
            ValueError: for a policy whose images differ, or one that needs scores where there are none, or the reverse.
        """
        masking, count = self.masking, None
        if masking is not None and masking.guided == guides:
            count = masking.visible_count(math.prod(self.encoder.grid))
        if count is None:
            needs = "guided" if guides else "unguided"
            raise ValueError(f"{self.name} needs a policy that hides equally many patches, {needs}; not {masking}")
        return count

    def check(self) -> None:
        """Refuses what can never learn, before data are opened; a method with other parts checks those, too.

        Raises:
            UserError: for a policy that hides all patches of every image, or none.
        """
        patches = math.prod(self.encoder.grid)
        for policy in self._policies():
            if policy.visible_count(patches) in (0, patches):
                raise UserError(
                    f"{policy} hides all or none of {patches} patches, so nothing can be learnt",
                    hint="--mask_ratio 0.75   or smaller patches",
                )

    def mask_words(self) -> str:
        """What is hidden of an image, as a run prints it before it starts."""
        patches = math.prod(self.encoder.grid)
        words = [f"{policy}{policy.count_words(self.encoder.grid)} of {patches} patches" for policy in self._policies()]
        return "; ".join(words) or "nothing is hidden"

    def _policies(self) -> list[Masking]:
        return [module for module in self.modules() if isinstance(module, Masking)]

    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """Named pictures ``(B, C, H, W)`` of what is done to ``images``, normalised alike, or maps ``(B, h, w)``."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """Name patterns, beyond biases and 1-D parameters, that are not decayed (read by timm's optimizer factory).

        Frequencies of learned rotary positions are none of the weights that decay is good for.
        """
        return {"*rope.freqs"}

    def setup(self, stage: str) -> None:
        """Teachers start as their students, whatever weights those were given; a checkpoint is restored after this."""
        for module in self.modules():
            if isinstance(module, Teacher):
                module.start()

    def configure_model(self) -> None:
        """Spreads the method over the processes if the strategy asks for that."""
        shard(self, self.device_mesh)

    def configure_optimizers(self) -> Optimizer:
        """AdamW in timm's two groups, or in groups by depth; the learning rate is set at every step."""
        apart = self.optim.layer_decay < 1 or self.optim.head_warmup > 0
        optimizer: Optimizer = create_optimizer_v2(
            self._groups() if apart else self,
            "adamw",
            lr=self.peak_lr,
            weight_decay=self.optim.weight_decay,
            betas=self.optim.betas,
            fused=True,
        )
        return optimizer

    def _groups(self) -> list[dict[str, Any]]:
        """The encoder's parameters by depth, the last block one factor below all other parts, which have scale 1."""
        decay, spared, rate = self.optim.weight_decay, self.no_weight_decay(), self.optim.layer_decay
        layers = param_groups_layer_decay(self.encoder.vit, decay, spared, layer_decay=rate)
        encoder = [{**group, "lr_scale": group["lr_scale"] * rate, "encoder": True} for group in layers]
        own = {id(parameter) for group in encoder for parameter in group["params"]}
        rest = param_groups_weight_decay(self, decay, no_weight_decay_list=spared)
        others = [{**group, "params": [p for p in group["params"] if id(p) not in own]} for group in rest]
        return [*encoder, *(group for group in others if group["params"])]

    def _hold_encoder(self) -> None:
        """Takes the encoder out of the backward pass while it stands still.

        Not where several processes share a step: the wrapper around the method expects the same gradients all along.
        """
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        hold = self.global_step < self.held_steps and not shared
        if hold and not self._held:
            self._held = [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]
        for parameter in self._held:
            parameter.requires_grad_(not hold)
        self._held = self._held if hold else []

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Whatever still draws from the global generator (drop path) becomes a function of the step, too."""
        self._hold_encoder()
        first = self.first_row(len(batch[1]), batch_idx)
        torch.manual_seed(derive_seed(self.plan.seed, "layers", self.global_step, first))

    def skip_step_unless_finite(self, values: Tensor) -> None:
        """For what steers a step but is not part of its loss: the step is skipped unless all ``values`` are finite."""
        self.skip_step.logical_or_(~values.isfinite().all())

    def known_ids(self, ids: Tensor) -> Tensor:
        """``ids`` of a tokenizer with 0 for unknown ones, -1, for which the step is skipped: integers tell no NaN."""
        self.skip_step.logical_or_((ids < 0).any())
        return ids.clamp(min=0)

    @property
    def step_was_skipped(self) -> Tensor:
        """Scalar bool on the device: whether the optimizer has refused a step, and so every step after it.

        What follows the weights, such as teachers and centres, must not move then.
        """
        return self.nonfinite_step >= 0

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Makes a fused optimizer skip a non-finite step and all later ones, without synchronising with the device."""
        if self.global_step < self.held_steps:
            for parameter in self.encoder.parameters():
                parameter.grad = None
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        bad = ~total(torch.nn.utils.get_total_norm(gradients)).isfinite() | self.skip_step
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = bad.float()
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            bad = flag > 0
        first = bad & (self.nonfinite_step < 0)
        self.nonfinite_step.copy_(torch.where(first, self.global_step, self.nonfinite_step))
        # Only fused optimizers read found_inf; on a CPU raise_if_nonfinite below ends the run before the step.
        fused = all(group.get("fused") for group in optimizer.param_groups)
        assert fused or self.device.type == "cpu", (
            f"only a fused optimizer skips steps that are not finite: {optimizer}"
        )
        optimizer.found_inf = self.step_was_skipped.float()  # type: ignore[attr-defined]  # read by fused AdamW
        if self.device.type == "cpu":
            self.raise_if_nonfinite()

    def raise_if_nonfinite(self) -> None:
        """Raises :class:`NonFiniteError` if a step was skipped; waits for the device, so call it rarely."""
        if (step := int(self.nonfinite_step)) < 0:
            return
        # On another device the newest numbers may be those of a later step.
        logged = self._trainer.callback_metrics if self._trainer and self.device.type == "cpu" else {}
        terms = [name for name, value in logged.items() if name.startswith("train/") and not value.isfinite()]
        raise NonFiniteError(step, " and ".join(terms) or "the loss or its gradient")

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,  # noqa: ANN401 - Lightning's signature
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Sets learning rate and weight decay from the step, steps, then calls :meth:`after_optimizer_step`."""
        step = self.global_step
        weight_decay = self.weight_decay(step)
        for group in optimizer.param_groups:
            group["lr"] = self.group_rate(group, step)
            group["weight_decay"] = weight_decay if group["weight_decay"] else 0.0
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.after_optimizer_step(step)

    def after_optimizer_step(self, step: int) -> None:
        """Called once after each optimizer step; update teachers and centres here.

        Whatever changes later than this is missing from the checkpoint of the step.

        Args:
            step: optimizer steps finished before this one.
        """

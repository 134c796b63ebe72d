"""Fine-tuning: the whole encoder learns to classify, by the recipe of MAE (arXiv:2111.06377, appendix A.1).

Layer-wise decay of the learning rate, stochastic depth, mixup and CutMix, label smoothing and the average of the
weights are timm's; everything random is a function of seed and step. Reported is the last epoch, never the best one.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from mim.encoder import Encoder
from mim.errors import UserError
from mim.evaluation.balance import balanced_of
from mim.evaluation.connections import ConnectionMaskedViT
from mim.evaluation.supervised import SupervisedTraining, set_drop_path
from mim.memory import MemoryViT
from mim.options.classification import FinetuneRecipe
from mim.randomness import derive_seed, keyed_generator, keyed_libraries
from mim.reduction import TokenReducedViT, TokenReduction, Tokens, distillation_loss
from mim.schedules import between, cosine, warmup_cosine
from mim.vit import ViT


def classifier(encoder: Encoder, classes: int, recipe: FinetuneRecipe, seed: int) -> ViT:
    """The encoder's ViT with a new classifier, every weight trainable.

    Mean pooling moves the norm behind the pooling, with new weights, as MAE does: timm's own layout of such models.

    Args:
        encoder: is taken apart.
        classes: number of classes.
        recipe: pooling, the model's own unless given, and stochastic depth.
        seed: of the classifier's weights, which are almost zero (deviation 2e-5).
    """
    vit, pool = encoder.vit, recipe.pool or encoder.pool
    if pool == "cls" and not encoder.has_class_token:
        raise UserError("--pool cls: this model has no class token", hint="--pool mean")
    if pool == "mean" and isinstance(getattr(vit, "fc_norm", None), nn.Identity):
        vit.fc_norm, vit.norm = type(vit.norm)(encoder.dim, eps=cast(nn.LayerNorm, vit.norm).eps), nn.Identity()
    vit.reset_classifier(classes, "avg" if pool == "mean" else "token")
    head = cast(nn.Linear, vit.get_classifier())
    nn.init.trunc_normal_(head.weight, std=2e-5, generator=keyed_generator(seed, "classifier"))
    nn.init.zeros_(head.bias)
    set_drop_path(vit, recipe.drop_path)
    return vit.requires_grad_(True)


_WRAPPERS = (TokenReducedViT, MemoryViT, ConnectionMaskedViT)


def _trainable(
    vit: ViT | MemoryViT, recipe: FinetuneRecipe, reduction: TokenReduction | None
) -> ViT | TokenReducedViT | MemoryViT | ConnectionMaskedViT:
    """What is called in a step: timm's model, or it with what surrounds it."""
    if isinstance(vit, MemoryViT):
        return vit
    if reduction is not None:
        return TokenReducedViT(vit, reduction)
    return ConnectionMaskedViT(vit, recipe.tlm) if recipe.tlm else vit


class Finetune(SupervisedTraining):
    """Trains a ViT with labels.

    Args:
        vit: with its classifier, or one that stands still with the memory of the task that is learned.
        recipe: how.
        classes: number of classes.
        images: how many there are to learn from.
        seed: of everything random.
        reduction: shortens the sequence in training and when scored; what it learns is added to the loss.
        teacher: a classifier of the same shape that the reduced one is to agree with.
    """

    def __init__(
        self,
        vit: ViT | MemoryViT,
        recipe: FinetuneRecipe,
        classes: int,
        images: int,
        seed: int,
        reduction: TokenReduction | None = None,
        teacher: ViT | None = None,
    ) -> None:
        super().__init__()
        self.model = _trainable(vit, recipe, reduction)
        self.model.train()  # what was loaded to be measured comes in evaluation mode, which Lightning leaves as it is
        self.teacher = teacher.requires_grad_(False) if teacher is not None else None
        self.recipe, self.seed = recipe, seed
        self.ema = ModelEmaV3(self.model, decay=recipe.ema).requires_grad_(False) if recipe.ema else None
        self.steps_per_epoch = images / recipe.batch_size
        self.max_steps = max(1, round(recipe.epochs * self.steps_per_epoch))
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            smoothing = recipe.label_smoothing
            mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=classes)  # type: ignore[no-untyped-call]  # timm leaves it without types
            self.mixup = mixup
        self.top1 = MulticlassAccuracy(classes, average="micro")
        self.top5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro")
        self.confusion = MulticlassConfusionMatrix(classes, validate_args=False)
        self.history: list[dict[str, float]] = []

    @property
    def vit(self) -> ViT:
        """Timm's model, without a reduction, memory or masks."""
        return cast(ViT, self.model.vit if isinstance(self.model, _WRAPPERS) else self.model)

    @property
    def evaluated(self) -> ViT | TokenReducedViT | MemoryViT | ConnectionMaskedViT:
        """What is scored and exported: the average of the weights where there is one."""
        return cast(ViT, self.ema.module) if self.ema is not None else self.model

    def training_step(self, batch: tuple[list[Tensor], Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy with the mixed and smoothed labels of one augmented view per image."""
        (images,), labels = batch
        if self.mixup is None:
            return self._loss(images, labels, self.recipe.label_smoothing)
        with keyed_libraries(self.seed, "mixup", self.global_step):
            images, targets = self.mixup(images, labels)  # (B, classes)
        return self._loss(images, targets, 0.0)

    def _loss(self, images: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Cross-entropy, and what the reduction learns."""
        if not isinstance(self.model, TokenReducedViT):
            return self._logged(F.cross_entropy(self.model(images), targets, label_smoothing=smoothing))
        tokens = self.model.forward_tokens(images)
        auxiliary = self.model.auxiliary_loss(tokens, targets)
        self.log("train/reduction", auxiliary)
        logits = self.model.forward_head(tokens)
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing) + auxiliary
        if self.teacher is not None:
            distilled = self._distilled(images, logits, tokens)
            self.log("train/teacher", distilled)
            loss = loss + distilled
        return self._logged(loss)

    def _distilled(self, images: Tensor, logits: Tensor, tokens: Tokens) -> Tensor:
        """How far answers and tokens are from the teacher's; tokens are normed wherever the layout has its norm."""
        teacher = cast(ViT, self.teacher)
        with torch.no_grad():
            whole = teacher.forward_features(images)
            answers = teacher.forward_head(whole)
        normed = tokens.with_x(self.vit.fc_norm(tokens.x))
        return distillation_loss(logits, normed, answers, teacher.fc_norm(whole))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Counts right answers; images that could not be read, of label -1, do not count."""
        images, labels = batch
        logits, truth = self.evaluated(images)[labels >= 0], labels[labels >= 0]
        for metric in (self.top1, self.top5, self.confusion):
            metric.update(logits, truth)

    def on_validation_epoch_start(self) -> None:
        """Scores with as many tokens as the next step would train with."""
        self._set_strength()

    def _set_strength(self) -> None:
        for model in (self.model, self.evaluated):
            if isinstance(model, TokenReducedViT):
                progress = between(self.global_step / self.max_steps, *self.recipe.anneal)
                model.reduction.strength = cosine(progress, 0.0, 1.0)

    def on_validation_epoch_end(self) -> None:
        """Adds the counts of all processes."""
        loss = self.trainer.callback_metrics.get("train/loss", torch.tensor(torch.nan))
        values = {"top1": float(self.top1.compute()), "top5": float(self.top5.compute()), "loss": float(loss)}
        self.taken_for = self.confusion.compute().cpu()  # (classes, classes) images, truth by answer
        values["balanced"] = balanced_of(self.taken_for)
        for metric in (self.top1, self.top5, self.confusion):
            metric.reset()
        self.history.append({"epoch": self.global_step / self.steps_per_epoch, **values})

    def learning_rate(self, step: int) -> float:
        """Of the last layer, at the step that follows ``step`` finished ones."""
        recipe = self.recipe
        warmup = round(min(recipe.warmup_epochs * self.steps_per_epoch, self.max_steps / 2))
        peak = recipe.blr * recipe.batch_size / 256
        return warmup_cosine(step, warmup, self.max_steps, peak, min(peak, recipe.min_lr))

    def configure_optimizers(self) -> Optimizer:
        """AdamW in timm's groups by layer; biases, norms, class token and positions are not decayed.

        Weights of a reduction learn as fast as the classifier. With memory there are no layers that learn: all of it
        learns at one rate, and only the classifier's matrix is decayed.
        """
        if isinstance(self.model, MemoryViT):
            groups = param_groups_weight_decay(
                self.model.tasks,
                self.recipe.weight_decay,
                [name for name, _ in self.model.tasks.named_parameters() if "head" not in name],
            )
            return torch.optim.AdamW(groups, lr=self.learning_rate(0))
        optimizer: Optimizer = create_optimizer_v2(
            self.vit,
            "adamw",
            lr=self.learning_rate(0),
            weight_decay=self.recipe.weight_decay,
            layer_decay=self.recipe.layer_decay,
            betas=(0.9, 0.999),
        )
        if isinstance(self.model, TokenReducedViT):
            for group in param_groups_weight_decay(self.model.reduction, self.recipe.weight_decay):
                optimizer.add_param_group({**group, "lr_scale": 1.0})
        return optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401 - Lightning's signature
        """Makes stochastic depth and the strength of a reduction functions of the step."""
        self._set_strength()
        torch.manual_seed(derive_seed(self.seed, "layers", self.global_step, self.trainer.global_rank, batch_idx))

    def after_optimizer_step(self) -> None:
        """Moves the average of the weights."""
        if self.ema is not None:
            self.ema.update(self.model)

    def _logged(self, loss: Tensor) -> Tensor:
        self.log("train/loss", loss)
        return loss

"""TokenUnify: a mixture of random-mask, next-token and next-all prediction (arXiv:2405.16847, 2024), for images.

Every step draws one of three tasks for one encoder. Masked: encode some patches, predict the others, as MAE does. Next:
every patch sees those before it in raster order and predicts the one behind it. Rest: encode the first patches and
predict all later ones.

Experimental: the paper trains a Mamba network on volumes of electron microscopy, and its released code does something
narrower than its text. This is a port of the idea to images and ViTs; none of its numbers is claimed.

Deviations:
    The encoder is a ViT, whose blocks are causal in the task of the next patch alone; evaluated and exported is the
    ordinary ViT, in which all patches see all.
    Class token and registers stand before the patches: all patches see them, and they see none.
    Nothing predicts the first patch. The next one is read off by a linear map, the others by MAE's decoder.
    How many patches come first is drawn once for all images of a step, so that a batch stays one dense tensor.
"""

import math
from itertools import accumulate
from typing import Literal

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from mim.encoder import Encoder
from mim.errors import UserError
from mim.layers.decoder import Decoder, decoder_shape
from mim.layers.initialisation import initialise
from mim.masking import Masking
from mim.methods.base import Batch, Method, OptimConfig, single_view
from mim.options.ranges import Count, NotNegative
from mim.patches import visible_indices
from mim.randomness import RowGenerator, derive_seed
from mim.targets import PixelTarget, Target

Task = Literal["masked", "next", "rest"]
TASKS: tuple[Task, ...] = ("masked", "next", "rest")


class TokenUnify(Method):
    """Mixture of random-mask, next-token and next-all prediction.

    Args:
        encoder: the ViT to train, plain or rotary; its patches must be embedded one by one.
        masking: what the first task hides; ``RandomMasking`` with ratio 0.75 as in MAE. It must hide equally many
            patches of every image, without guidance.
        target: what is predicted for patches; pixels standardised within their patch if not given.
        weights: how often each task is drawn, relative to the others: hidden patches from visible ones, the next patch
            from those before it, all later patches from the first ones. ``[1, 0, 0]`` is MAE.
        decoder_width: width of the decoder, as for MAE; two thirds of the encoder's (512 at most) if null.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder; one per 32 of its width if null.
        optim: learning rate, weight decay and warm-up.
    """

    masking: Masking

    def __init__(
        self,
        encoder: Encoder,
        masking: Masking,
        target: Target | None = None,
        weights: tuple[NotNegative, NotNegative, NotNegative] = (1.0, 1.0, 1.0),
        decoder_width: Count | None = None,
        decoder_depth: Count = 8,
        decoder_heads: Count | None = None,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(encoder, masking, optim)
        check_encoder(encoder)
        if not sum(weights) > 0:
            raise ValueError(f"weights {list(weights)}: no task is ever drawn")
        self.weights = dict(zip(TASKS, weights, strict=True))
        self.visible_count = self.fixed_visible_count()
        self.target = target or PixelTarget(standardise=True)
        self.patches = math.prod(encoder.grid)
        out_dim = self.target.dim(encoder)
        sizes = decoder_shape(encoder.dim, decoder_width, decoder_depth, decoder_heads)
        self.decoder: nn.Module = nn.Module()  # without parameters, for no task
        if self.weights["masked"] or self.weights["rest"]:
            self.decoder = Decoder(encoder.dim, encoder.grid, encoder.num_prefix, out_dim, **sizes)
        initialise(self.decoder)
        if not encoder.pretrained:
            initialise(encoder)
        self.predict_next: nn.Module = nn.Linear(encoder.dim, out_dim) if self.weights["next"] else nn.Module()
        initialise(self.predict_next)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Error of the patches that the task of this step predicts; of pixels, the mean square."""
        images, valid = single_view(batch)
        task, first = self.draw_task()
        mask = self.draw_mask(self.row_generator(len(images), batch_idx))  # (B, N)
        prediction, places = self.predict(task, images, mask, first)
        target, weights = self.target.measured(images, self.encoder.grid, places, valid)
        loss = self.target.loss(prediction, target, weights)
        self.log("train/loss", loss)
        self.log("train/task", loss.new_full((), TASKS.index(task)).detach())
        idle = self.decoder if task == "next" else self.predict_next
        return self.anchored(reaching(loss, idle), images)

    def draw_task(self) -> tuple[Task, int]:
        """The task of this step and the number of patches that come first: the same in every process.

        Both follow from seed and step alone, and neither is a number of the device.
        """
        seed = derive_seed(self.plan.seed, "task", self.global_step)
        chance, share = RowGenerator.for_rows(seed, 0, 1).common(2)
        *ends, total = accumulate(self.weights.values())
        task = TASKS[sum(chance * total >= end for end in ends)]
        return task, 1 + int(share * (self.patches - 1))

    def predict(self, task: Task, images: Tensor, mask: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Predictions of a task, ``(B, M, dim)``, and their places, ``(B, M)``.

        Args:
            task: which one.
            images: ``(B, C, H, W)``.
            mask: ``(B, N)``, what the first task hides.
            first: patches from which the last task predicts all others.
        """
        if task == "masked":
            return self.reconstruct(images, mask, self.visible_count)
        if task == "next":
            return self.foretell(images)
        later = torch.arange(self.patches, device=images.device) >= first
        return self.reconstruct(images, later.expand(len(images), -1), first)

    def reconstruct(self, images: Tensor, mask: Tensor, visible_count: int) -> tuple[Tensor, Tensor]:
        """Hidden patches from visible ones, which see each other, as in MAE: ``(B, M, dim)`` at ``(B, M)``."""
        hidden = visible_indices(~mask, self.patches - visible_count)  # (B, M)
        latent = self.encoder(images, mask, visible_count=visible_count)  # (B, P + K, D)
        return self.decoder(latent, mask, hidden), hidden

    def foretell(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Every patch but the first from those before it, ``(B, N - 1, dim)`` at ``(B, N - 1)``."""
        tokens = self.encoder.forward_causal(images)[:, self.encoder.num_prefix : -1]  # (B, N - 1, D)
        places = torch.arange(1, self.patches, device=images.device).expand(len(images), -1)
        return self.predict_next(tokens), places

    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """Of every task that is ever drawn, predictions in their places; of the first, what it hides, grey.

        The masks depend on the row alone, and half of the patches come first, so pictures of one batch compare over
        training. Every next patch is predicted from true ones.
        """
        mask = self.draw_mask(RowGenerator.for_rows(0, 0, len(images), images.device))
        shown: dict[str, Tensor] = {}
        for task in (task for task in TASKS if self.weights[task]):
            prediction, places = self.predict(task, images, mask, max(1, self.patches // 2))
            pictures = self.target.pictures(prediction, images, self.encoder.grid, places)
            shown |= pictures if task == "masked" else {task: list(pictures.values())[-1]}
        return shown


def reaching(loss: Tensor, idle: nn.Module) -> Tensor:
    """``loss`` itself, with a gradient of zero for a part that has no task at this step.

    Several processes expect a gradient of every parameter, and AdamW then averages over all steps, as for the mean of
    the three losses.
    """
    for parameter in idle.parameters():
        loss = loss + 0.0 * parameter.sum()
    return loss


def check_encoder(encoder: Encoder) -> None:
    """Refuses an encoder in which a patch shows in the tokens before it, or whose tokens are no patches in the end.

    Raises:
        UserError: for a stem that looks beyond patches.
        ValueError: for a token reduction.
    """
    stem = type(encoder.vit.patch_embed)
    if stem is not PatchEmbed:
        raise UserError(
            f"TokenUnify predicts each patch from those before it, and {stem.__name__} shows what lies beyond a patch",
            hint="--model vit_small_patch16_224",
        )
    if encoder.reduction is not None:
        raise ValueError("TokenUnify predicts from the token of each patch; the encoder must not have a reduction")

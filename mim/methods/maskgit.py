"""MaskGIT: masked generative image transformer (arXiv:2202.04200, 2022).

Hide a random share of an image's ids, from almost none to all, and predict them from the others. Asked several times,
each time with the surest of its answers made known, the network draws images out of nothing, or fills in holes.

Deviations:
    The network sees the pixels that each known id stands for, one token per patch, so that what is exported is a ViT
    for images; the paper learns a vector per id. Its head has a linear map of its own, not the one of the input.
    The class is a part of the mask token, not a token in front; it matters only where something is hidden.
    Blocks are timm's, with the norm in front and without dropout. Every image weighs alike, whatever it hides, so that
    micro-batches may be cut at will.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.encoder import Encoder
from mim.errors import UserError
from mim.layers.decoding import Decoding, decode_iteratively
from mim.layers.initialisation import initialise
from mim.masking import CosineMasking, Masking
from mim.methods.base import Batch, Method, OptimConfig, single_view
from mim.options.ranges import Whole
from mim.patches import hidden_places, measured_patches, measured_weights
from mim.randomness import RowGenerator
from mim.targets import TokenTarget


class MaskGIT(Method):
    """Ids of hidden tokens from the others; draws images.

    Args:
        encoder: the ViT to train; its patches are as large as the tokenizer's tokens.
        masking: what to hide; ``CosineMasking`` in the paper.
        target: the tokenizer, and how the labels are smoothed; by 0.1 in the paper.
        classes: labels of the data that images can be drawn of; 0, as by default, looks at none.
        optim: learning rate, weight decay and warm-up.
    """

    masking: Masking

    def __init__(
        self,
        encoder: Encoder,
        masking: Masking | None = None,
        target: TokenTarget | None = None,
        classes: Whole = 0,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(encoder, masking or CosineMasking(), optim)
        self.target = target or TokenTarget(smoothing=0.1)
        self.classes = classes
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, encoder.dim), std=0.02))
        # One more than there are classes: images without a label.
        self.class_tokens = nn.Embedding(classes + 1, encoder.dim) if classes else None
        self.head = nn.Sequential(
            nn.Linear(encoder.dim, encoder.dim),
            nn.GELU(),
            nn.LayerNorm(encoder.dim),
            nn.Linear(encoder.dim, self.target.tokenizer.codes),
        )
        initialise(self.head)
        if self.class_tokens is not None:
            nn.init.normal_(self.class_tokens.weight, std=0.02)

    def check(self) -> None:
        """Refuses patches that are not tokens."""
        super().check()
        if self.target.tokens_per_patch(self.encoder) != 1:
            stride = self.target.tokenizer.stride
            raise UserError(
                f"patches of {self.encoder.patch_size[0]} px are larger than tokens of {stride} px",
                why="ids are predicted one by one",
                hint=f"--patch_size {stride}",
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of hidden ids, mean over those of an image, then over images."""
        images, valid = single_view(batch)
        ids = self.known_ids(self.target.ids(images)).flatten(1)  # (B, N)
        mask = self.draw_mask(self.row_generator(len(images), batch_idx))  # (B, N)
        image, place, weight = hidden_places(mask, mask.shape[1])
        if valid is not None:
            measured = measured_patches(valid, self.encoder.patch_size)
            weight = measured_weights(weight, image, measured[image, place], len(images))
        logits = self.head(self.encode(ids, mask, batch[1])[image, place])  # (M, V)
        error = F.cross_entropy(
            logits.float(), ids[image, place], reduction="none", label_smoothing=self.target.smoothing
        )
        loss = (error * weight).sum() / len(images)
        self.log("train/loss", loss)
        return self.anchored(loss, images)

    def encode(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """Tokens of all places, ``(B, N, D)``, out of the ``ids (B, N)`` that are not hidden by ``mask (B, N)``.

        Args:
            ids: hidden ones may be anything.
            mask: True = hidden.
            labels: ``(B,)`` classes, -1 where there is none; none if not given.
        """
        seen = self.target.mosaic(ids.view(-1, *self.encoder.grid))
        tokens: Tensor = self.encoder(seen.to(self.mask_token.dtype), mask, self.hidden_token(labels, len(ids)))
        return tokens[:, self.encoder.num_prefix :]

    def hidden_token(self, labels: Tensor | None, count: int) -> Tensor:
        """What stands where ids are hidden: ``(1, 1, D)``, or ``(B, 1, D)`` where classes are told."""
        if self.class_tokens is None:
            return self.mask_token
        if labels is None:
            labels = torch.full((count,), -1, device=self.mask_token.device)
        known = (labels >= 0) & (labels < self.classes)
        own: Tensor = self.class_tokens(torch.where(known, labels, self.classes))
        return self.mask_token + own[:, None]

    @torch.no_grad()
    def draw_images(
        self,
        images: Tensor,
        hidden: Tensor,
        seed: int,
        decoding: Decoding = Decoding(),  # noqa: B008 - frozen
        classes: Sequence[int] = (),
    ) -> Tensor:
        """See :class:`~mim.layers.decoding.DrawsImages`."""
        if strange := [label for label in classes if not 0 <= label < self.classes]:
            raise UserError(
                f"--classes {strange[0]}: the run was trained with {self.classes} classes", hint="leave --classes out"
            )
        labels = None
        if classes:
            labels = torch.tensor([classes[row % len(classes)] for row in range(len(images))], device=images.device)

        def predict(ids: Tensor, hidden: Tensor) -> Tensor:
            logits: Tensor = self.head(self.encode(ids, hidden, labels))
            return logits

        rows = RowGenerator.for_rows(seed, 0, len(images), images.device)
        ids = decode_iteratively(predict, self.target.ids(images).flatten(1), hidden, rows, decoding)  # (B, N)
        return self.target.pictured(ids.view(-1, *self.encoder.grid)).to(images.dtype)

    @torch.no_grad()
    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """What the tokens show of ``images``, what was hidden of them, and two fillings of that.

        Masks and numbers depend on the row alone, so pictures of one batch compare over training.
        """
        rows = RowGenerator.for_rows(0, 0, len(images), images.device)
        known = self.target.pictured(self.target.ids(images)).to(images.dtype)
        mask = rows.rand(self.encoder.grid[0] * self.encoder.grid[1]) < 0.5  # (B, N)
        area = F.interpolate(mask.view(-1, 1, *self.encoder.grid).to(images.dtype), images.shape[2:], mode="nearest")
        first, second = (self.draw_images(images, mask, seed, Decoding(steps=8)) for seed in (1, 2))
        return {"tokens": known, "hidden": known * (1 - area), "filled in": first, "another": second}

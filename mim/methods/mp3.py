"""MP3: position prediction as an effective pretraining strategy (arXiv:2207.07611, 2022).

Patches enter without positions; a random part of them is all that any patch may look at; every patch then tells, from
its own content and that part, which place of the image it comes from. There is neither a decoder nor a teacher.
Smoothed labels and attentive weights are those of DropPos (arXiv:2309.03576, 2023).

Deviations:
    DropPos weighs a patch by its likeness to the class token. Here there is none, since through it all patches would
    see all; the mean of the patches takes its place, without a gradient.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mim.encoder import Encoder
from mim.errors import UserError
from mim.masking import Masking
from mim.methods.base import Batch, Method, OptimConfig, single_view
from mim.options.ranges import NotNegative, Positive
from mim.patches import gather_tokens, measured_values, replace_patches, visible_indices
from mim.pictures.arrows import arrows
from mim.randomness import RowGenerator
from mim.schedules import linear

_WITHOUT_POSITIONS = "{pos_embed: none, class_token: false, global_pool: avg}"


@dataclass(frozen=True)
class PositionConfig:
    """What counts as right, and how much each patch counts.

    Args:
        smoothing: a place at distance ``d`` from the true one gets ``exp(-(d / smoothing)^2)`` of its label, in patches
            at the first step; it falls to 0 in a straight line. 1 in DropPos, 0 for plain labels as in MP3.
        temperature: patches are weighted by the softmax of their likeness to the mean patch over this; 0.1 in DropPos.
            All count alike if not given, as in MP3.
    """

    smoothing: NotNegative = 0.0
    temperature: Positive | None = None


class MP3(Method):
    """Position prediction.

    Args:
        encoder: the ViT to train, without positions, class token and registers:
            ``kwargs: {pos_embed: none, class_token: false, global_pool: avg}``.
        masking: which patches only look and are not looked at; ``RandomMasking`` with ratio 0.5 on small images and
            0.75 on large ones. It must hide equally many patches of every image, without guidance.
        positions: what counts as right.
        optim: learning rate, weight decay and warm-up.
    """

    masking: Masking
    positions: Tensor

    def __init__(
        self,
        encoder: Encoder,
        masking: Masking,
        positions: PositionConfig = PositionConfig(),
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(encoder, masking, optim)
        check_encoder(encoder)
        self.visible_count = self.fixed_visible_count()
        self.settings = positions
        self.predict = nn.Linear(encoder.dim, math.prod(encoder.grid))
        rows, columns = encoder.grid
        place = torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(columns)))  # (N, 2)
        self.register_buffer("positions", place, persistent=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of the place of every patch."""
        images, valid = single_view(batch)
        mask = self.draw_mask(self.row_generator(len(images), batch_idx))  # (B, N), hidden ones are seen by no other
        tokens = self.encode(images, mask)  # (B, N, D)
        logits = self.predict(tokens).float()  # (B, N, N)
        error = -(self.labels() * logits.log_softmax(dim=-1)).sum(dim=-1)  # (B, N)
        weights = self.weights(tokens.detach(), valid)
        loss = (error * weights).sum() / weights.sum().clamp(min=1e-6)
        self.log("train/loss", loss)
        self.log_dict(health(logits.detach(), self.positions, self.encoder.grid))
        return self.anchored(loss, images)

    def encode(self, images: Tensor, mask: Tensor) -> Tensor:
        """Tokens of all patches, ``(B, N, D)``, which look at the visible ones in every block."""
        vit, context = self.encoder.vit, visible_indices(mask, self.visible_count)  # (B, K)
        tokens = vit.norm_pre(self.encoder.embed(images))
        for block in vit.blocks:
            if vit.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(looking_at, block, tokens, context, use_reentrant=False)
            else:
                tokens = looking_at(block, tokens, context)
        normed: Tensor = vit.norm(tokens)
        return normed

    def labels(self) -> Tensor:
        """What is right for every patch at this point of the run: ``(N, N)``, rows sum to 1."""
        if not (width := linear(self.progress, self.settings.smoothing, 0.0)):
            return torch.eye(len(self.positions), device=self.positions.device)
        return (-(torch.cdist(self.positions, self.positions) / width).square()).softmax(dim=-1)

    def weights(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """How much every patch counts, ``(B, N)``; not at all if most of it was not measured."""
        weights = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
        if self.settings.temperature is not None:
            likeness = F.cosine_similarity(tokens.float(), tokens.float().mean(dim=1, keepdim=True), dim=-1)
            weights = (likeness / self.settings.temperature).softmax(dim=1)
        if valid is not None:
            weights = weights * measured_values(valid, self.encoder.patch_size, 1).amax(dim=-1)
        return weights

    @torch.no_grad()
    def visualize(self, images: Tensor) -> dict[str, Tensor]:
        """The patches that are looked at, arrows from where a patch is to where it is believed to be, and their length.

        The masks depend on the row alone, so pictures of one batch compare over training.
        """
        grid, size = self.encoder.grid, self.encoder.patch_size
        mask = self.draw_mask(RowGenerator.for_rows(0, 0, len(images), images.device))
        guess = self.positions[self.predict(self.encode(images, mask)).argmax(dim=-1)]  # (B, N, 2)
        hidden = visible_indices(~mask, mask.shape[1] - self.visible_count)
        return {
            "hidden": replace_patches(images, size, hidden, 0.0),
            "position": arrows(images, grid, guess),
            "distance": (guess - self.positions).norm(dim=-1).view(-1, *grid),
        }


def check_encoder(encoder: Encoder) -> None:
    """Refuses an encoder in which positions show.

    Raises:
        UserError: that names what gives them away.
    """
    vit, block = encoder.vit, encoder.vit.blocks[0]
    leaks = {
        "rotary positions": getattr(vit, "rope", None) is not None,
        f"a stem that looks beyond patches ({type(vit.patch_embed).__name__})": type(vit.patch_embed) is not PatchEmbed,
        "positions added to its patches": vit.pos_embed is not None,
        "tokens beside its patches, through which all would see all": encoder.num_prefix > 0,
        f"blocks of type {type(block).__name__}": type(block) is not Block or type(block.attn) is not Attention,
        "a token reduction": encoder.reduction is not None,
    }
    for what, found in leaks.items():
        if found:
            raise UserError(
                f"MP3 predicts the place of each patch and cannot train an encoder with {what}",
                hint="--model vit_small_patch16_224 --registers 0 "
                f"--model.init_args.encoder.kwargs '{_WITHOUT_POSITIONS}'",
            )


def looking_at(block: nn.Module, tokens: Tensor, context: Tensor) -> Tensor:
    """What a timm block makes of ``tokens (B, N, D)`` if they attend to those at ``context (B, K)`` alone.

    The same as the block with a mask of its attention, without keys and values that nobody looks at.
    """
    block = cast(Block, block)
    attn, normed = cast(Attention, block.attn), block.norm1(tokens)
    width, bias = attn.qkv.out_features // 3, attn.qkv.bias
    weights = attn.qkv.weight.tensor_split([width])
    biases = (None, None) if bias is None else bias.tensor_split([width])
    query = F.linear(normed, weights[0], biases[0])  # (B, N, D)
    parts = (query, *F.linear(gather_tokens(normed, context), weights[1], biases[1]).chunk(2, dim=2))
    query, key, value = (part.reshape(*part.shape[:2], attn.num_heads, -1).transpose(1, 2) for part in parts)
    dropped = attn.attn_drop.p if block.training else 0.0
    attended = F.scaled_dot_product_attention(attn.q_norm(query), attn.k_norm(key), value, dropout_p=dropped)
    mixed = attn.proj_drop(attn.proj(attn.norm(attended.transpose(1, 2).flatten(2))))
    tokens = tokens + block.drop_path1(block.ls1(mixed))
    refined: Tensor = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
    return refined


def health(logits: Tensor, places: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    """How good guesses are, ``(B, N, N)`` logits for patches at ``places (N, 2)``.

    Returns:
        Share of the patches that are placed right, of all and of those at the border, which may give themselves away
        by what crops and lenses do there; and the mean distance in patches.
    """
    guess = logits.argmax(dim=-1)  # (B, N)
    right = (guess == torch.arange(len(places), device=logits.device)).float().mean(dim=0)  # (N,)
    row, column = places.unbind(1)
    border = (row == 0) | (row == grid[0] - 1) | (column == 0) | (column == grid[1] - 1)
    return {
        "health/placed": right.mean(),
        "health/placed_at_border": (right * border).sum() / border.sum(),
        "health/distance": (places[guess] - places).norm(dim=-1).mean(),
    }

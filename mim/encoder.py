"""The one adapter over timm's plain and rotary ViTs: encode all, only the visible, or partly replaced patches."""

import json
from collections.abc import Collection, Iterator, Sequence
from math import isqrt, prod
from typing import Any, Literal, cast, final

import timm
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import checkpoint_seq
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mim.errors import UserError
from mim.hub import SCHEMES, missing_on_hub
from mim.layers.positions import sincos_positions, stretch_positions
from mim.lora import adapt
from mim.options.ranges import Count, ShareBelowOne, Whole
from mim.options.timm_names import no_such_model
from mim.patches import gather_tokens, patch_grid, patchify, visible_indices
from mim.reduction.attention import Attending, can_be_halved, check_block, mlp_half
from mim.reduction.base import TokenReduction
from mim.reduction.schedule import KeepRate
from mim.reduction.tokens import Tokens
from mim.vit import ViT, without_weights

_MOVING = ("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords")
_MAX_PATCHES = 1 << 18  # 512 x 512


@final
class Encoder(nn.Module):
    """A timm Vision Transformer whose patches can be hidden.

    Args:
        model: timm name of a plain or rotary ViT (EVA-02, DINOv3, PE), or ``local-dir:FOLDER`` for an exported one.
        img_size: image side in pixels, or ``[height, width]``; the model's own if not given.
        patch_size: patch side in pixels; the model's own if not given.
        in_chans: image channels; the model's own if not given.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        positions: ``learned``, or the fixed ``sincos`` table of MAE in its place. Rotary positions stay as they are; a
            rotary model that has no table beside them, such as DINOv3, gets none.
        dynamic_img_size: accept images of any size that divides into patches; positions are resampled. None leaves it
            to the model.
        resampling: how positions get to another size: ``antialiased`` is timm's way, ``stretched`` that of DINO and
            iBOT, see :func:`mim.layers.positions.stretch_positions`.
        grad_checkpointing: recompute blocks in the backward pass: less memory, about a third more time.
        pretrained: start from timm's weights.
        kwargs: further arguments of the timm model, such as ``{reg_tokens: 4}``.
        reduction: shortens the sequence inside the blocks; may be set and taken away later, too.
        registers: learned tokens beside the class token that belong to no patch; the model's own number if not given.
        lora: rank of the additions to the linear layers of attention, which alone learn then (LoRA): for good weights.
    """

    behind_patches = ("attn_pool", "fc_norm")
    """Parts of timm's model that are not on the way to the patches."""

    def __init__(
        self,
        model: str,
        img_size: Count | tuple[Count, Count] | None = None,
        patch_size: Count | None = None,
        in_chans: Count | None = None,
        drop_path_rate: ShareBelowOne = 0.0,
        positions: Literal["learned", "sincos"] = "learned",
        dynamic_img_size: bool | None = False,
        resampling: Literal["antialiased", "stretched"] = "antialiased",
        grad_checkpointing: bool = False,
        pretrained: bool = False,
        kwargs: dict[str, Any] | None = None,
        reduction: TokenReduction | None = None,
        registers: Whole | None = None,
        lora: Count | None = None,
    ) -> None:
        super().__init__()
        self.pretrained, self.resampling = pretrained, resampling
        skeleton = _skeleton(model)
        rotary = isinstance(skeleton, Eva)
        settings = {"patch_size": patch_size, "in_chans": in_chans, "num_classes": 0, **(kwargs or {})}
        settings |= {"num_reg_tokens" if rotary else "reg_tokens": registers} if registers is not None else {}
        settings |= {"drop_path_rate": drop_path_rate, "dynamic_img_size": dynamic_img_size}
        settings = {name: value for name, value in settings.items() if value is not None}
        size = _checked_size(model, skeleton, img_size, settings.get("patch_size"))
        try:
            vit = timm.create_model(model, pretrained=pretrained, img_size=size, **settings)
        except OSError as problem:  # no network, offline mode, a folder without weights
            raise UserError(
                f"--model {model}: timm could not get its pretrained weights",
                why=str(problem).partition("\n")[0],
                hint="--model local-dir:FOLDER with weights on this machine, or a network connection",
            ) from problem
        except TypeError as problem:
            if not (unknown := [name for name in kwargs or {} if f"argument '{name}'" in str(problem)]):
                raise
            kind = f"{type(skeleton).__name__}{' (rotary positions)' if rotary else ''}"
            hint = "--model vit_small_patch16_224   or   " * rotary + _kwargs(kwargs or {}, without=unknown[0])
            raise UserError(
                f"--model {model}: timm's {kind} takes no {unknown[0]}",
                why=f"it is among --model.init_args.encoder.kwargs {json.dumps(kwargs)}, of the recipe or yours",
                hint=hint,
            ) from problem
        except AssertionError as problem:  # how timm refuses arguments that do not go together
            raise UserError(f"--model {model} cannot be built with {kwargs}", why=str(problem)) from problem
        self.vit = cast(ViT, vit)
        if not len(self.vit.blocks):
            raise UserError(
                f"--model {model} with kwargs {kwargs} has no blocks", hint=_kwargs(kwargs or {}, without="depth")
            )
        _fix_coordinates(self.vit, model, kwargs or {})
        self._tables: dict[tuple[object, ...], Tensor] = {}  # fixed rotary positions by grid; see _rotary
        self.vit.set_grad_checkpointing(grad_checkpointing)
        if reduction is not None:
            reduction.check(self.vit)
        self.reduction = reduction
        # Pooling comes after the tokens: it stays in the exported model, but pretraining has no gradient for it.
        for name in self.behind_patches:
            if (pooling := getattr(self.vit, name)) is not None:
                pooling.requires_grad_(False)
        if positions == "sincos" and not (rotary and self.vit.pos_embed is None):
            prefix = 0 if self.vit.no_embed_class else self.num_prefix
            table = sincos_positions(self.grid, self.dim, prefix)
            self.vit.pos_embed = nn.Parameter(table, requires_grad=False)
        if lora is not None:
            adapt(self.vit, lora)

    @property
    def dim(self) -> int:
        """Width ``D`` of a token."""
        return int(self.vit.embed_dim)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per side ``(h, w)``."""
        height, width = self.vit.patch_embed.grid_size
        return height, width

    @property
    def img_size(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        height, width = self.vit.patch_embed.img_size
        return height, width

    @property
    def patch_size(self) -> tuple[int, int]:
        """Patch height and width in pixels."""
        return self.img_size[0] // self.grid[0], self.img_size[1] // self.grid[1]

    @property
    def in_chans(self) -> int:
        """Image channels ``C``."""
        return int(self.vit.patch_embed.proj.in_channels)

    @property
    def num_prefix(self) -> int:
        """Prefix tokens ``P``: class token, then registers or distillation token."""
        return int(self.vit.num_prefix_tokens)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.vit.blocks)

    @property
    def middle(self) -> range:
        """Numbers of the blocks that not all tokens need to go through: from half of them less one to all but one."""
        return range(max(1, self.depth // 2 - 1), self.depth - 1)

    def check_middle(self) -> None:
        """Refuses to leave tokens out of the :attr:`middle` blocks where that cannot be.

        Raises:
            ValueError: where there are none, or the sequence is shortened already.
        """
        if not self.middle:
            raise ValueError(f"middle_share: an encoder of {self.depth} blocks has none in the middle")
        if self.reduction is not None:
            raise ValueError("middle_share: the encoder has a reduction, which shortens the sequence already")

    @property
    def any_size(self) -> bool:
        """Whether images may have another size than :attr:`img_size`."""
        return bool(self.vit.dynamic_img_size)

    @property
    def has_class_token(self) -> bool:
        """Whether the first token stands for the whole image."""
        return self.vit.cls_token is not None

    @property
    def has_class_attention(self) -> bool:
        """Whether there is a class token whose attention in the last block can be read."""
        return self.has_class_token and can_be_halved(self.vit.blocks[-1])

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation, per channel, of the pixels in 0..1 that timm's weights of this model expect."""
        expected = cast(dict[str, Any], self.vit.pretrained_cfg)
        return list(expected["mean"]), list(expected["std"])

    @property
    def pool(self) -> Literal["cls", "mean"]:
        """What timm's model pools by; where it pools in another way than these two, the mean of the patch tokens."""
        return "cls" if self.vit.global_pool in ("token", "") and self.has_class_token else "mean"

    def normed(self, tokens: Tensor) -> Tensor:
        """The final norm of tokens that :meth:`after_blocks` gives, ``(B, P + K, D)``."""
        normed: Tensor = self.vit.norm(tokens)
        return normed

    def mean_of(self, tokens: Tokens) -> Tensor:
        """Mean over patches, ``(B, D)``, of what :meth:`forward_tokens` gives.

        Models made for mean pooling have their final norm behind it; elsewhere ``fc_norm`` is the identity.
        """
        mean: Tensor = self.vit.fc_norm(tokens.patch_mean())
        return mean

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        visible_count: int | None = None,
        dropped: Tensor | None = None,
        passing: Tensor | None = None,
    ) -> Tensor:
        """Encode images; patch tokens stay in raster order.

        Args:
            images: ``(B, C, H, W)``.
            mask: ``(B, N)`` bool, True = hidden. On its own it drops hidden patches after positions are added, as if
                they had never been there; all rows must hide equally many.
            mask_token: ``(1, 1, D)``, or ``(B, 1, D)``; stands in for hidden patches before positions are added;
                nothing is dropped.
            visible_count: patches that are not dropped; if it is not given, a GPU is waited for to count them.
            dropped: ``(B, N)`` bool, beside a mask token: patches that are left out as hidden ones are without one; all
                rows must drop equally many.
            passing: ``(B, K')``, ascending numbers of the patch tokens, 0 to ``K - 1``, that go through the
                :attr:`middle` blocks; the others wait and rejoin in their places. All if not given.

        Returns:
            ``(B, P + K, D)`` after the final norm; ``K`` counts the visible patches, or all if none is dropped. With a
            reduction, ``K`` is what it leaves, in its own order.
        """
        self._check(images, mask)
        start = self._start(images, mask, mask_token, visible_count, dropped)
        x = self._run_blocks(start).x if passing is None else self._run_passing(start, passing)
        normed: Tensor = self.vit.norm(x)
        return normed

    def forward_causal(self, images: Tensor) -> Tensor:
        """As :meth:`forward` for whole images, but every token attends to itself and to those before it alone.

        Patches stand in raster order behind the prefix: they see all of it, and it sees none of them. A reduction is
        left out.

        Returns:
            ``(B, P + N, D)`` after the final norm.
        """
        self._check(images, None)
        normed: Tensor = self.vit.norm(self._run_whole(self._start(images), causal=True))
        return normed

    def embed(self, images: Tensor) -> Tensor:
        """Patches before positions, prefix and blocks: ``(B, C, H, W)`` to ``(B, N, D)``."""
        self._check(images, None)
        return cast(Tensor, self.vit.patch_embed(images)).flatten(1, -2)

    def forward_tokens(self, images: Tensor) -> Tokens:
        """As :meth:`forward`, with the map that tells what a reduction made of each patch."""
        self._check(images, None)
        tokens = self._run_blocks(self._start(images))
        return tokens.with_x(self.vit.norm(tokens.x))

    def forward_with_attention(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``(B, P + N, D)`` and the class token's attention to the patches in the last block, ``(B, N)``.

        Attention is the mean over heads; its softmax runs over prefix and patches, so rows sum to less than 1. Both are
        those of the model without its reduction, which would leave patches that nobody looks at.
        """
        attended, x = self._attend(images)
        tokens: Tensor = self.vit.norm(mlp_half(self.vit.blocks[-1], x))
        return tokens, attended.class_attention()

    def head_attention(self, images: Tensor) -> Tensor:
        """The class token's attention to the patches in the last block, head by head: ``(B, heads, N)``."""
        return self._attend(images)[0].head_attention()

    def block_by_block(self, images: Tensor) -> Iterator[tuple[Tensor, Attending, Tensor]]:
        """Of every block, in order: tokens before it ``(B, P + N, D)``, its attention, tokens behind it.

        All are those of the model without its reduction.

        Raises:
            TypeError: if a block cannot be taken apart.
        """
        self._check(images, None)
        start = self._start(images)
        x = start.x
        for layer, block in enumerate(self.vit.blocks):
            check_block(block)
            attending = Attending(block, self.num_prefix)
            behind = mlp_half(block, attending.half(x, **start.inputs(layer)))
            yield x, attending, behind
            x = behind

    def before_last_block(self, images: Tensor) -> Tokens:
        """Tokens ``(B, P + N, D)`` that enter the last block of the model without its reduction."""
        self._check(images, None)
        start = self._start(images)
        return start.with_x(self._run_whole(start, last=-1))

    def last_block(self, tokens: Tokens) -> Tensor:
        """What :meth:`before_last_block` gives, behind the last block and the final norm, ``(B, P + N, D)``."""
        normed: Tensor = self.vit.norm(self.vit.blocks[-1](tokens.x, **tokens.inputs(self.depth - 1)))
        return normed

    def feature_map(self, images: Tensor) -> Tensor:
        """Patch tokens as ``(B, D, h, w)``; those that a reduction took away are put back."""
        (tokens,) = self.after_blocks(images, [self.depth - 1])
        return self.dense(tokens)

    def after_blocks(
        self,
        images: Tensor,
        layers: Collection[int],
        mask: Tensor | None = None,
        visible_count: int | None = None,
    ) -> list[Tokens]:
        """Tokens after each of some blocks, before the final norm; blocks behind the last of them do not run.

        Args:
            images: ``(B, C, H, W)``.
            layers: numbers of the blocks, from 0.
            mask: ``(B, N)`` bool, True = dropped, as for :meth:`forward`.
            visible_count: as for :meth:`forward`.
        """
        self._check(images, mask)
        run = self.reduction or TokenReduction(KeepRate(1.0))  # which calls block after block
        start = self._start(images, mask, visible_count=visible_count)
        checkpointing = bool(self.vit.grad_checkpointing)
        return run.after_blocks(
            layers,
            cast(nn.Sequential, self.vit.blocks),
            start.x,
            self.num_prefix,
            start.grid,
            start.rope,
            checkpointing=checkpointing,
            visible=start.visible,
        )

    def dense(self, tokens: Tokens) -> Tensor:
        """Tokens of :meth:`after_blocks` as a normalised map ``(B, D, h, w)``, with what a reduction took away."""
        assert tokens.grid is not None
        patches: Tensor = self.vit.norm(tokens.dense())  # (B, N, D)
        return patches.transpose(1, 2).reshape(-1, self.dim, *tokens.grid)

    def _check(self, images: Tensor, mask: Tensor | None) -> None:
        """Refuses shapes that do not belong together, where timm would not notice."""
        height, width = images.shape[2:]
        rows, columns = patch_grid(images, self.patch_size)
        if (height, width) != self.img_size and not self.any_size:
            built = f"{self.img_size[0]} x {self.img_size[1]}"
            raise ValueError(
                f"images of {height} x {width} pixels, but the encoder was built for {built}; set img_size"
            )
        if mask is not None and mask.shape != (len(images), rows * columns):
            raise ValueError(
                f"mask is {tuple(mask.shape)}, but there are {len(images)} images of {rows * columns} patches"
            )

    def _start(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        visible_count: int | None = None,
        dropped: Tensor | None = None,
    ) -> Tokens:
        """Tokens with positions, ``(B, P + K, D)``, as they enter the first block."""
        grid, visible = patch_grid(images, self.patch_size), None
        left_out = mask if mask_token is None else dropped
        if left_out is not None:
            visible = visible_indices(left_out, visible_count)
            patches = self._project_visible(images, visible)  # reads no other pixels
            if mask is not None and mask_token is not None:
                patches = torch.where(mask.gather(1, visible)[..., None], mask_token.to(patches.dtype), patches)
            x = self._join(images, patches, visible)
        else:
            patches = self.vit.patch_embed(images)  # (B, N, D), or (B, h, w, D) with dynamic_img_size
            if mask is not None and mask_token is not None:
                hidden = mask.view(patches.shape[:-1])[..., None]
                token = mask_token if patches.ndim == 3 else mask_token[:, None]
                patches = torch.where(hidden, token.to(patches.dtype), patches)
            x = self._add_positions(images, patches)
        whole = grid if visible is None else None
        return Tokens.start(self.vit.norm_pre(x), self.num_prefix, whole, self._rotary(grid), visible)

    def _add_positions(self, images: Tensor, patches: Tensor) -> Tensor:
        """All ``patches`` with prefix and positions; timm does it, unless positions are resampled in another way."""
        timms = self.resampling == "antialiased" or not self.any_size
        if timms and not isinstance(self.vit, Eva):  # Eva would make its rotary positions anew at every call
            tokens: Tensor = self.vit._pos_embed(patches)
            return tokens
        patches = patches.flatten(1, -2)  # (B, N, D)
        return self._join(images, patches, torch.arange(patches.shape[1], device=patches.device)[None])

    def _join(self, images: Tensor, patches: Tensor, places: Tensor) -> Tensor:
        """``patches (B, K, D)`` that stand at ``places (B or 1, K)`` with their positions, behind the prefix."""
        vit, batch = self.vit, len(images)
        prefix = [
            token for token in (vit.cls_token, vit.reg_token, getattr(vit, "dist_token", None)) if token is not None
        ]
        table = self._positions(images)
        if table is not None:
            on_prefix, on_patches = table[0].tensor_split([0 if vit.no_embed_class else self.num_prefix])
            patches = patches + F.embedding(places, on_patches)
            if prefix and not vit.no_embed_class:
                prefix = [torch.cat(prefix, dim=1) + on_prefix]
        tokens: Tensor = torch.cat([*(token.expand(batch, -1, -1) for token in prefix), patches], dim=1)
        drops = table is not None or isinstance(vit, Eva)  # as in timm
        return vit.pos_drop(tokens) if drops else tokens

    def _project_visible(self, images: Tensor, visible: Tensor) -> Tensor:
        """Patch embedding of the patches ``visible (B, K)``, without positions."""
        embed = cast(PatchEmbed, self.vit.patch_embed)
        if type(embed) is not PatchEmbed:  # other stems look beyond the borders of a patch
            return gather_tokens(embed(images).flatten(1, -2), visible)
        # A convolution whose stride is its kernel is a linear map of each patch: project only what is visible.
        weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C)
        patches: Tensor = embed.norm(F.linear(patchify(images, self.patch_size, visible), weight, embed.proj.bias))
        return patches

    def _positions(self, images: Tensor) -> Tensor | None:
        """The position table for images of this size, ``(1, P + N, D)``, or ``(1, N, D)`` if the prefix has none."""
        table: Tensor | None = self.vit.pos_embed
        if table is None or not self.any_size:
            return table
        prefix = 0 if self.vit.no_embed_class else self.num_prefix
        if self.resampling == "stretched":
            return stretch_positions(table, self.grid, patch_grid(images, self.patch_size), prefix)
        resampled: Tensor = resample_abs_pos_embed(
            table, list(patch_grid(images, self.patch_size)), list(self.grid), num_prefix_tokens=prefix
        )
        return resampled

    def _rotary(self, grid: tuple[int, int]) -> Tensor | None:
        """Rotary positions of all patches, ``(N, 2d)`` or ``(depth, heads, N, 2d)``; None for models without them."""
        rope: Any = getattr(self.vit, "rope", None)
        if rope is None:
            return None
        shape = {"shape": list(grid)} if self.any_size or not hasattr(rope, "feat_shape") else {}  # timm's own rule
        if next(rope.parameters(), None) is not None:  # learned frequencies
            table: Tensor = rope.get_embed(**shape)
            return table
        like = next(rope.buffers())
        key = (grid, like.device, like.dtype)
        if key not in self._tables:
            with torch.inference_mode(False), torch.no_grad():  # or training could not use what probes have made
                self._tables[key] = rope.get_embed(**shape)
        return self._tables[key]

    def _run_blocks(self, start: Tokens) -> Tokens:
        """All blocks, with the reduction if there is one."""
        if self.reduction is None:
            return start.with_x(self._run_whole(start))
        reduced: Tokens = self.reduction(
            self.vit.blocks,
            start.x,
            self.num_prefix,
            start.grid,
            start.rope,
            checkpointing=bool(self.vit.grad_checkpointing),
            visible=start.visible,
        )
        return reduced

    def _run_passing(self, start: Tokens, passing: Tensor) -> Tensor:
        """Tokens ``(B, P + K, D)`` behind all blocks, of which only ``passing (B, K')`` go through the middle."""
        waits = torch.ones(passing.shape[0], start.count, device=passing.device, dtype=torch.bool)
        waits = waits.scatter(1, passing, False)
        waiting = visible_indices(~waits, start.count - passing.shape[1])
        first, last = self.middle.start, self.middle.stop
        before = start.with_x(self._run_whole(start, last=first))
        middle = before.keep(passing, waiting)
        middle = middle.with_x(self._run_whole(middle, first, last))
        return self._run_whole(middle.rejoined(), last)

    def _run_whole(self, start: Tokens, first: int = 0, last: int | None = None, causal: bool = False) -> Tensor:
        """Tokens ``(B, P + K, D)`` behind the blocks from ``first`` to before ``last``; ``causal`` ones look back."""
        checkpointing = self.vit.grad_checkpointing and torch.is_grad_enabled()
        x, blocks = start.x, self.vit.blocks[first:last]
        if isinstance(self.vit, VisionTransformer) and not causal:
            encoded: Tensor = checkpoint_seq(blocks, x, use_reentrant=False) if checkpointing else blocks(x)
            return encoded
        inputs, by_block = start.inputs(0), start.rope is not None and start.rope.ndim == 4
        for layer, block in enumerate(blocks, first):
            inputs = start.inputs(layer) if by_block else inputs
            inputs = inputs | {"is_causal": True} if causal else inputs
            x = checkpoint(block, x, use_reentrant=False, **inputs) if checkpointing else block(x, **inputs)
        return x

    def _attend(self, images: Tensor) -> tuple[Attending, Tensor]:
        """Queries and keys of the last block, and the tokens behind its attention."""
        if not self.has_class_attention:
            raise ValueError("this ViT has no class token whose attention could be read")
        start = self._start(images)
        attending = Attending(self.vit.blocks[-1], self.num_prefix)
        x = attending.half(self._run_whole(start, last=-1), **start.inputs(self.depth - 1))
        return attending, x


def _fix_coordinates(vit: ViT, model: str, given: dict[str, Any]) -> None:
    """Rotary positions do not move at random in training: Sapiens2, which would, is told not to."""
    if asked := [name for name in given if name in _MOVING and given[name] is not None]:
        raise UserError(
            f"--model {model}: {', '.join(asked)} would move rotary positions at random",
            why="timm draws that from the global generator, so that no run could be repeated",
            hint=_kwargs({name: value for name, value in given.items() if name not in _MOVING}),
        )
    if (rope := getattr(vit, "rope", None)) is not None:
        rope.aug_active = False


def _kwargs(kwargs: dict[str, Any], without: str = "") -> str:
    """The option that gives timm the other arguments."""
    others = {name: value for name, value in kwargs.items() if name != without}
    return f"--model.init_args.encoder.kwargs '{json.dumps(others)}'"


def _checked_size(
    model: str, skeleton: ViT, img_size: int | tuple[int, int] | None, patch_size: int | tuple[int, int] | None
) -> tuple[int, int]:
    """The image size to build for; refuses, on a skeleton without weights, what could not work."""
    embed = skeleton.patch_embed
    own_patch = tuple(side // cells for side, cells in zip(embed.img_size, embed.grid_size, strict=True))
    size, patch = _pair(img_size or embed.img_size), _pair(patch_size or own_patch)
    patches = prod(side // cell for side, cell in zip(size, patch, strict=True))
    if patches > _MAX_PATCHES:
        raise UserError(
            f"--img_size {_side(size)} has {patches:,} patches of {_side(patch)}, more than {_MAX_PATCHES:,}",
            why="every patch is a token, and each of them looks at every other",
            hint=f"--img_size {_side([isqrt(_MAX_PATCHES) * cell for cell in patch])}   or larger patches",
        )
    if all(side % cell == 0 for side, cell in zip(size, patch, strict=True)):
        return size
    lower = [max(1, side // cell) * cell for side, cell in zip(size, patch, strict=True)]
    upper = [-(-side // cell) * cell for side, cell in zip(size, patch, strict=True)]
    raise UserError(
        f"--img_size {_side(size)} does not divide by the patch size {_side(patch)} of {model}",
        why="the pixels left over at the right and the bottom would be ignored",
        hint="   or   ".join(dict.fromkeys(f"--img_size {_side(near)}" for near in (lower, upper))),
    )


def _skeleton(model: str) -> ViT:
    """The model without storage for weights, if it is a ViT that can be wrapped."""
    if model.startswith(SCHEMES) and (reason := missing_on_hub(model.partition(":")[2], "config.json")):
        raise UserError(
            f"--model {model} cannot be had from the Hugging Face Hub",
            why=reason,
            hint="--model local-dir:FOLDER with the model on this machine, or a network connection",
        )
    try:
        with without_weights():
            skeleton = timm.create_model(model, num_classes=0)
    except (RuntimeError, ValueError) as error:  # the latter for what looks like a path
        if not str(error).startswith(("Unknown model", "Invalid pretrained tag", "Model name")):
            raise
        raise no_such_model(model) from None
    if isinstance(skeleton, VisionTransformer | Eva):
        return skeleton
    raise UserError(
        f"--model {model} is neither a plain nor a rotary ViT, so patches cannot be hidden",
        why=f"it is timm's {type(skeleton).__name__}, whose tokens are no patches that could be left out one by one",
        hint="--model vit_small_patch16_224   or   --model vit_small_patch16_dinov3",
    )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _side(size: Sequence[int]) -> str:
    """``96``, or ``[96,128]`` if the sides differ."""
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"

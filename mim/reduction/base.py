"""What every token reduction is: a driver over a ViT's blocks that shortens the sequence on the way."""

from collections.abc import Collection
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mim.reduction.attention import Attending, check_block, mlp_half
from mim.reduction.schedule import Schedule, call_of
from mim.reduction.tokens import Tokens


class TokenReduction(nn.Module):
    """Runs the blocks of a ViT and leaves fewer tokens after some of them; subclasses write :meth:`reduce`.

    Blocks that reduce nothing run as they are. The others run in two halves, with timm's own parts and fused attention.

    Args:
        schedule: how many patch tokens each block leaves.
        place: reduce in the ``middle`` of a block, between attention and MLP, or ``after`` it.
        proportional: merged tokens are attended to as often as they have patches (ToMe, arXiv:2210.09461, eq. 1).
        rejoin: all patches come back before the last block, dropped ones as they were when dropped (Cropr's last-layer
            fusion); the result is then as long as without a reduction.

    Attributes:
        reads_attention: needs the queries and keys of the blocks that reduce.
        needs_class_token: asks what the class token looks at.
        strength: share of the tokens that the schedule takes away which are taken; training may let it grow to 1.
    """

    reads_attention: bool = True
    needs_class_token: bool = False

    def __init__(
        self,
        schedule: Schedule,
        place: Literal["middle", "after"] = "middle",
        proportional: bool = False,
        rejoin: bool = False,
    ) -> None:
        super().__init__()
        self.schedule, self.place, self.proportional, self.rejoin = schedule, place, proportional, rejoin
        self.strength = 1.0

    def reduce(self, tokens: Tokens, attending: Attending | None, count: int, layer: int) -> Tokens:
        """Shorten the sequence.

        Args:
            tokens: more than ``count`` patch tokens.
            attending: queries and keys of this block's attention; None if the reduction reads none.
            count: patch tokens to be left, if there are more.
            layer: number of the block.
        """
        raise NotImplementedError

    def left(self, patches: int, layer: int, depth: int, grid: tuple[int, int] | None) -> int:
        """Patch tokens after a block that has ``patches`` of them: a whole number in ``1 .. patches``."""
        taken = patches - self.schedule.left(patches, layer, depth)
        return max(1, min(patches, patches - round(taken * self.strength)))

    def cost(self, before: int, after: int, dim: int, head_dim: int) -> int:
        """Multiply-adds of one :meth:`reduce` per image, from ``before`` to ``after`` patch tokens."""
        return 0

    def counts(self, patches: int, depth: int, grid: tuple[int, int] | None = None) -> list[int]:
        """Patch tokens after each block, not counting those that rejoin at the end."""
        counts = [patches]
        for layer in range(depth):
            counts.append(self.left(counts[-1], layer, depth, grid))
        return counts[1:]

    def describe(self) -> str:
        """The call that builds it: all that a result depends on, beside what was trained."""
        return call_of(self)

    def static(self, blocks: nn.Sequential, x: Tensor, num_prefix: int, rope: Tensor | None = None) -> "TokenReduction":
        """The same with numbers that are known beforehand; itself, unless they are up to each image.

        Args:
            blocks: of the model that it was trained with.
            x: ``(B, P + N, D)``, images as they enter the first block, to take the numbers from.
            num_prefix: prefix tokens ``P``.
            rope: rotary positions.
        """
        return self

    def check(self, vit: nn.Module) -> None:
        """Refuses a model that this reduction cannot shorten.

        Raises:
            TypeError: if its blocks are of an unknown kind, there is no class token to ask, or what has been or will be
                learnt is for models of another size.
        """
        for name, size in (("dim", vit.embed_dim), ("depth", len(cast(nn.Sequential, vit.blocks)))):
            if (own := getattr(self, name, size)) != size:
                raise TypeError(f"this reduction is for models of {name} {own}; this one has {size}")
        if self.needs_class_token and getattr(vit, "cls_token", None) is None:
            raise TypeError(
                "this reduction asks what the class token looks at, and the model has none; score by others"
            )
        if self.place == "middle" or self.reads_attention:
            for block in cast(nn.Sequential, vit.blocks):
                check_block(block)

    def forward(
        self,
        blocks: nn.Sequential,
        x: Tensor,
        num_prefix: int,
        grid: tuple[int, int] | None = None,
        rope: Tensor | None = None,
        checkpointing: bool = False,
    ) -> Tokens:
        """Run all blocks.

        Args:
            blocks: of a timm ViT.
            x: ``(B, P + N, D)``, as it enters the first block.
            num_prefix: prefix tokens ``P``; they are never moved, merged or dropped.
            grid: ``(h, w)`` of the patches; None if they are not a whole grid.
            rope: rotary positions as timm's ``_pos_embed`` returns them.
            checkpointing: recompute blocks in the backward pass.
        """
        (tokens,) = self.after_blocks({len(blocks) - 1}, blocks, x, num_prefix, grid, rope, checkpointing)
        return tokens

    def after_blocks(
        self,
        layers: Collection[int],
        blocks: nn.Sequential,
        x: Tensor,
        num_prefix: int,
        grid: tuple[int, int] | None = None,
        rope: Tensor | None = None,
        checkpointing: bool = False,
    ) -> list[Tokens]:
        """As :meth:`forward`, but the tokens after each of some blocks; those behind the last of them do not run.

        Args:
            layers: numbers of the blocks, from 0; the tokens come in the order of the blocks.
            blocks: see :meth:`forward`, as all others.
            x: as it enters the first block.
            num_prefix: prefix tokens.
            grid: of the patches.
            rope: rotary positions.
            checkpointing: recompute in the backward pass.
        """
        tokens, found = Tokens.start(x, num_prefix, grid, rope), []
        for layer, block in zip(range(max(layers) + 1), blocks, strict=False):
            if self.rejoin and layer == len(blocks) - 1:
                tokens = tokens.rejoined()
            if checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(self.step, block, tokens, layer, len(blocks), use_reentrant=False)
            else:
                tokens = self.step(block, tokens, layer, len(blocks))
            if layer in layers:
                found.append(tokens)
        return found

    def step(self, block: nn.Module, tokens: Tokens, layer: int, depth: int) -> Tokens:
        """Run one block."""
        inputs = tokens.inputs(layer, self.proportional)
        last = self.rejoin and layer == depth - 1  # what came back stays
        count = tokens.count if last else self.left(tokens.count, layer, depth, tokens.grid)
        if not self.acts(tokens.count, count, layer):
            return tokens.after_block(block(tokens.x, **inputs))
        if self.place == "after" and not self.reads_attention:
            return self.reduce(tokens.after_block(block(tokens.x, **inputs)), None, count, layer)
        attending = Attending(block, tokens.num_prefix)
        tokens = tokens.after_block(attending.half(tokens.x, **inputs))
        if self.place == "middle":
            tokens = self.reduce(tokens, attending, count, layer)
            return tokens.after_block(mlp_half(block, tokens.x))
        return self.reduce(tokens.after_block(mlp_half(block, tokens.x)), attending, count, layer)

    def acts(self, before: int, after: int, layer: int) -> bool:
        """Whether a block calls :meth:`reduce`; those that hide tokens act without making them fewer."""
        return after < before

    def auxiliary_loss(self, tokens: Tokens, labels: Tensor) -> Tensor:
        """What a trained reduction adds to the loss of its task: a scalar, zero for the others.

        Args:
            tokens: as :meth:`forward` has returned them in training mode.
            labels: ``(B,)`` class numbers, ``(B, classes)`` their probabilities, or ``(B, H, W)`` classes of pixels,
                -1 where there is none, for reductions that learn from masks.
        """
        return tokens.x.new_zeros(())

"""The sequence while it is shortened, with one integer map that tells where every patch of the image has gone."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mim.patches import gather_tokens


@dataclass(frozen=True)
class Tokens:
    """Prefix tokens, which are never touched, and the ``K`` patch tokens that are left of ``N``.

    Args:
        x: ``(B, P + K, D)``.
        num_prefix: ``P``.
        grid: ``(h, w)`` patches of the image; None if some were hidden before the first block.
        assign: ``(B, N)`` int64, what each patch has become: ``s >= 0`` is patch token ``s``, alone or merged with
            others; ``s < 0`` was dropped, and ``~s`` counts its row in ``parked``. Everything else derives from this
            map.
        parked: ``(B, R, D)`` each: dropped tokens as they were when they were dropped.
        merged: some token stands for several patches, or for none.
        blend: ``(B, N, K)``, rows summing to 1, where patches are better rebuilt from several tokens than copied from
            one.
        places: ``(B, K)``, the patch whose rotary position a token has; a merged one has that of the token it began as,
            and ``N`` means none.
        rope: timm's table of rotary positions, ``(N, 2d)`` or ``(depth, heads, N, 2d)``; None for most models.
        auxiliary: what trained reductions learn from, one tensor per reducing block; empty in evaluation.
        alive: ``(B, K)`` for reductions that take no token out of the sequence but hide it from the others: bool, False
            stays as it is and is not attended to; or float 0 and 1 in training, whose gradient tells what it is worth.
        canvas: ``(B, N, classes)``, answers that patches gave before they left.
    """

    x: Tensor
    num_prefix: int
    grid: tuple[int, int] | None
    assign: Tensor
    places: Tensor
    rope: Tensor | None = None
    parked: tuple[Tensor, ...] = ()
    merged: bool = False
    blend: Tensor | None = None
    auxiliary: tuple[Tensor, ...] = ()
    alive: Tensor | None = None
    canvas: Tensor | None = None

    @classmethod
    def start(
        cls, x: Tensor, num_prefix: int, grid: tuple[int, int] | None = None, rope: Tensor | None = None
    ) -> "Tokens":
        """All patches, each its own token."""
        identity = torch.arange(x.shape[1] - num_prefix, device=x.device).expand(x.shape[0], -1)
        return cls(x, num_prefix, grid, assign=identity, places=identity, rope=rope)

    @property
    def count(self) -> int:
        """Patch tokens ``K``."""
        return self.x.shape[1] - self.num_prefix

    @property
    def patches(self) -> Tensor:
        """Patch tokens ``(B, K, D)``."""
        return self.x[:, self.num_prefix :]

    @property
    def sizes(self) -> Tensor:
        """How many patches each token stands for, ``(B, K)`` float32; 0 for hidden tokens."""
        present = self.assign >= 0
        zeros = torch.zeros(self.x.shape[0], self.count, device=self.x.device)
        sizes = zeros.scatter_add(1, self.assign.clamp(min=0), present.float())
        return sizes if self.alive is None else sizes * self.alive

    @property
    def uneven(self) -> bool:
        """Whether tokens stand for different numbers of patches, so that a mean must count them."""
        return self.merged or self.alive is not None

    @property
    def gone(self) -> Tensor:
        """Patches that have left, ``(B, N)`` bool: dropped or hidden."""
        gone = self.assign < 0
        return gone if self.alive is None else gone | (self.alive.gather(1, self.assign.clamp(min=0)) == 0)

    def inputs(self, layer: int, proportional: bool = False) -> dict[str, Any]:
        """What a block needs beside ``x``: the bias of merged tokens and rotary positions.

        Args:
            layer: number of the block.
            proportional: a token that stands for ``s`` patches is attended to ``s`` times, by ``log s`` on its logits.
        """
        inputs: dict[str, Any] = {}
        if proportional and self.merged:
            bias = torch.nn.functional.pad(self.sizes.clamp(min=1).log(), (self.num_prefix, 0))
            inputs["attn_mask"] = bias[:, None, None].to(self.x.dtype)  # (B, 1, 1, P + K)
        if self.alive is not None:
            inputs["attn_mask"] = self._hiding(self.alive).to(self.x.dtype)
        if self.rope is not None:
            inputs["rope"] = self._rope_of(layer, self.rope)
        return inputs

    def _hiding(self, alive: Tensor) -> Tensor:
        """Bias that hides tokens from all others, ``(B, 1, 1, P + K)``, or ``(B, 1, P + K, P + K)`` with a gradient."""
        if alive.dtype == torch.bool:
            hidden = torch.nn.functional.pad(~alive, (self.num_prefix, 0))
            return torch.zeros_like(hidden, dtype=torch.float).masked_fill(hidden, -torch.inf)[:, None, None]
        # DynamicViT's masked softmax, written as a bias: a dropped token sees itself, and 1e-6 of it is seen.
        bias = torch.nn.functional.pad((alive + 1e-6).log(), (self.num_prefix, 0))
        return bias[:, None, None] * (1 - torch.eye(bias.shape[1], device=bias.device))

    def _rope_of(self, layer: int, table: Tensor) -> Tensor:
        table = table[layer] if table.ndim == 4 else table  # (N, 2d), or (heads, N, 2d) of this block
        if self.places is self.assign:  # nothing was reduced yet: timm's own table, to the bit
            return table
        sine, cosine = table[..., :1, :].chunk(2, dim=-1)
        still = torch.cat([torch.zeros_like(sine), torch.ones_like(cosine)], dim=-1)  # for what stands nowhere
        table = torch.cat([table, still], dim=-2)
        # A head dimension is a must: without it timm takes the batch for heads wherever both numbers agree.
        rows = table[:, self.places].transpose(0, 1) if table.ndim == 3 else table[self.places][:, None]
        return rows  # (B, heads or 1, K, 2d)

    def with_x(self, x: Tensor) -> "Tokens":
        """Other features of the same tokens."""
        return replace(self, x=x)

    def after_block(self, x: Tensor) -> "Tokens":
        """What a block has made of the tokens; hidden ones stay what they were."""
        if self.alive is None or self.alive.dtype != torch.bool:
            return replace(self, x=x)
        alive = torch.nn.functional.pad(self.alive, (self.num_prefix, 0), value=True)
        return replace(self, x=torch.where(alive[..., None], x, self.x))

    def hiding(self, alive: Tensor) -> "Tokens":
        """The same sequence, in which only tokens ``alive (B, K)`` of those that were alive go on."""
        return replace(self, alive=alive if self.alive is None else alive & (self.alive > 0))

    def keep(self, kept: Tensor, dropped: Tensor) -> "Tokens":
        """Goes on with ``kept (B, K')`` in this order and parks ``dropped (B, R)``; together they are all tokens."""
        parked = sum(rows.shape[1] for rows in self.parked)
        label = torch.zeros_like(self.places).scatter(1, kept, _numbers(kept))
        label = label.scatter(1, dropped, ~(parked + _numbers(dropped)))
        patches = self.patches
        tokens = self._relabel(gather_tokens(patches, kept), kept, label)
        return replace(tokens, parked=(*self.parked, gather_tokens(patches, dropped)))

    def merge(self, centre: Tensor, source: Tensor, target: Tensor, weight: Tensor | None = None) -> "Tokens":
        """Folds tokens into others as weighted means.

        Args:
            centre: ``(B, K')`` tokens that go on, in this order, each with what is folded into it.
            source: ``(B, R)`` all other tokens.
            target: ``(B, R)`` place in ``centre`` of the token that each source is folded into.
            weight: ``(B, K)``, positive; the sizes of the tokens if not given.
        """
        weight = self.sizes if weight is None else weight
        moved = weight.gather(1, source)
        total = weight.gather(1, centre).scatter_add(1, target, moved)  # (B, K')
        share = moved / total.gather(1, target).clamp(min=1e-12)
        x = gather_tokens(self.patches, centre)
        # A mean as a step from the centre: what nothing is folded into stays as it is, to the bit.
        step = share[..., None].to(x.dtype) * (gather_tokens(self.patches, source) - gather_tokens(x, target))
        x = x.scatter_add(1, target[..., None].expand(-1, -1, x.shape[2]), step)
        label = torch.zeros_like(self.places).scatter(1, centre, _numbers(centre)).scatter(1, source, target)
        return replace(self._relabel(x, centre, label), merged=True)

    def extended(self, token: Tensor) -> "Tokens":
        """One more token ``(B, 1, D)``, which stands for no patch."""
        nowhere = torch.full_like(self.places[:, :1], self.assign.shape[1])
        x, places = torch.cat([self.x, token], dim=1), torch.cat([self.places, nowhere], dim=1)
        return replace(self, x=x, places=places, merged=True)

    def _relabel(self, patches: Tensor, centre: Tensor, label: Tensor) -> "Tokens":
        """``patches (B, K', D)`` in place of the old ones; ``label (B, K)`` says what each of those became."""
        moved = label.gather(1, self.assign.clamp(min=0))
        return replace(
            self,
            x=torch.cat([self.x[:, : self.num_prefix], patches], dim=1),
            assign=torch.where(self.assign >= 0, moved, self.assign),
            places=self.places.gather(1, centre),
        )

    def patch_mean(self) -> Tensor:
        """Mean over the patches that are left, ``(B, D)``; a merged token counts as often as it has patches."""
        if not self.uneven:
            return self.patches.mean(dim=1)
        return weighted_mean(self.patches, self.sizes)

    def answered(self, answer: Tensor) -> Tensor:
        """Answers ``(B, classes, h', w')``, and those of the canvas where patches gave theirs before they left."""
        if self.canvas is None or self.grid is None:
            return answer
        shape = (answer.shape[0], -1, *self.grid)
        early = self.canvas.transpose(1, 2).reshape(shape).to(answer.dtype)
        gone = self.gone[:, None].float().reshape(shape)
        early, gone = (torch.nn.functional.interpolate(part, answer.shape[2:]) for part in (early, gone))
        return torch.where(gone > 0, early, answer)

    def dense(self) -> Tensor:
        """A token for each of the ``N`` patches, in their order, ``(B, N, D)``.

        Merged patches get a copy of their token, or a blend of several; dropped ones what they were when dropped.
        """
        if self.places is self.assign:  # nothing was reduced
            return self.patches
        if self.blend is not None:
            return self.blend.to(self.x.dtype) @ self.patches
        bank = torch.cat([self.patches, *self.parked], dim=1) if self.parked else self.patches
        row = torch.where(self.assign >= 0, self.assign, self.count + ~self.assign)
        return gather_tokens(bank, row)

    def rejoined(self) -> "Tokens":
        """All patches again, each its own token, as :meth:`dense` gives them."""
        if self.places is self.assign:
            return self
        x = torch.cat([self.x[:, : self.num_prefix], self.dense()], dim=1)
        start = Tokens.start(x, self.num_prefix, self.grid, self.rope)
        return replace(start, auxiliary=self.auxiliary, canvas=self.canvas)


def weighted_mean(x: Tensor, weight: Tensor) -> Tensor:
    """``(B, K, D)`` and ``(B, K)`` to ``(B, D)``; in float32, as half precision cannot count beyond 256."""
    weight = weight[..., None].float()
    mean = (weight * x.float()).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-6)
    return mean.to(x.dtype)


def _numbers(rows: Tensor) -> Tensor:
    """0, 1, 2, ... in every row of a ``(B, K)`` tensor."""
    return torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[0], -1)

"""A frozen ViT that serves several tasks in one pass (Sandler et al., arXiv:2203.15243), each by a memory of its own.

Tokens of the image see neither class tokens nor memory of any task, so they, and all that was ever computed from them,
stay what they are to the bit. A task's class token sees the tokens of the image but the model's own class token, in
whose place it stands, then itself and the cells of its own task. Cells are keys and values only.

Deviations: tasks are always learned in this way, which the paper calls attention masking, never with memory that the
tokens of the image see; AdamW in place of SGD.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mim.memory.task import Task
from mim.reduction.attention import Attending, branch, mlp_half

ORIGINAL = "original"
"""What answers of the classifier that the model came with are called."""


class MemoryViT(nn.Module):
    """A plain timm ViT that stands still, and what was learned for tasks.

    Args:
        vit: is not changed, but for being frozen and staying in evaluation mode.
        tasks: by name, letters, digits, ``-`` and ``_``.

    Raises:
        TypeError: as :func:`check_memory`.
    """

    def __init__(self, vit: VisionTransformer, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        check_memory(vit)
        self.vit = vit.requires_grad_(False)
        self.tasks = nn.ModuleDict(tasks)
        self.train(self.training)

    def train(self, mode: bool = True) -> "MemoryViT":
        """Of the tasks alone: the model has no stochastic depth and no dropout."""
        super().train(mode)
        self.vit.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to the logits of all tasks side by side, ``(B, classes of all tasks)``."""
        return torch.cat(self._answers(self._encoded(images, whole=False)[1]), dim=1)

    def by_task(self, images: Tensor) -> dict[str, Tensor]:
        """Logits ``(B, classes)`` of each task by its name, and of the model's own classifier if it has one."""
        tokens, class_tokens = self._encoded(images)
        answers = dict(zip(self.tasks, self._answers(class_tokens), strict=True))
        return ({ORIGINAL: self.vit.forward_head(tokens)} if self.vit.num_classes else {}) | answers

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the image as timm gives them, ``(B, P + N, D)``, and class tokens of the tasks, ``(B, T, D)``."""
        tokens, class_tokens = self._encoded(images)
        return tokens, self._normed(class_tokens)

    def _encoded(self, images: Tensor, whole: bool = True) -> tuple[Tensor, Tensor]:
        """Tokens of the image behind the final norm and class tokens before it; of the former only if ``whole``."""
        vit, tasks = self.vit, list(self._tasks())
        with torch.no_grad():
            x = cast(Tensor, vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))))
        class_tokens = torch.cat([task.class_token for task in tasks], dim=1).expand(len(x), -1, -1)  # (B, T, D)
        first = 0 if vit.cls_token is None else 1  # the model's own class token is not looked at
        mask = _own_alone([task.cells for task in tasks], x.shape[1] - first, x.device)
        for layer, block in enumerate(vit.blocks):
            with torch.no_grad():
                x, keys, values = _through(block, x, only_seen=not whole and layer == len(vit.blocks) - 1)
            seen = keys[:, :, first:], values[:, :, first:]
            class_tokens = _look(cast(Block, block), class_tokens, self._cells(block, layer), seen, mask)
        return vit.norm(x) if whole else x, class_tokens

    def _cells(self, block: nn.Module, layer: int) -> Tensor:
        """Memory of all tasks in a block, ``(M, D)``, as its attention takes it."""
        norm = cast(nn.Module, block.norm1)
        return torch.cat([norm(task.memory[layer]) if task.normed else task.memory[layer] for task in self._tasks()])

    def _answers(self, class_tokens: Tensor) -> list[Tensor]:
        normed = self._normed(class_tokens)
        return [cast(Tensor, task.head(normed[:, place])) for place, task in enumerate(self._tasks())]

    def _normed(self, class_tokens: Tensor) -> Tensor:
        """Behind the final norm, which models for mean pooling have at ``fc_norm``."""
        return cast(Tensor, self.vit.fc_norm(self.vit.norm(class_tokens)))

    def _tasks(self) -> Iterator[Task]:
        return (cast(Task, task) for task in self.tasks.values())


def check_memory(vit: nn.Module) -> None:
    """Refuses models whose attention cannot take memory.

    Raises:
        TypeError: naming what it is.
    """
    if not isinstance(vit, VisionTransformer):
        raise TypeError(f"timm's {type(vit).__name__} is no plain ViT")
    for block in vit.blocks:
        inner = getattr(block, "attn", block)
        if type(block) is not Block or type(inner) is not Attention:
            raise TypeError(f"its blocks are of type {type(block).__name__} with {type(inner).__name__}")


class _Recording(Attending):
    """Remembers values, too."""

    values: Tensor

    def qkv(self, x: Tensor) -> Tensor:
        """Called by timm's attention with ``(B, P + N, D)``."""
        projected: Tensor = self.block.attn.qkv(x)
        self.values = _heads(projected, self.block.attn, 3)[2]
        return projected


def _through(block: nn.Module, x: Tensor, only_seen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the image behind a block, and its keys and values ``(B, heads, P + N, d)``; ``x`` itself if no more."""
    if only_seen:
        return x, *_keys_and_values(cast(Any, block.attn), cast(nn.Module, block.norm1)(x))
    recording = _Recording(block, 0)
    x = mlp_half(block, recording.half(x))
    return x, recording.keys, recording.values


def _look(
    block: Block, class_tokens: Tensor, cells: Tensor, seen: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """Class tokens ``(B, T, D)`` behind a block."""
    attention, normed = cast(Any, block.attn), block.norm1(class_tokens)
    queries, keys, values = _heads(attention.qkv(normed), attention, 3)  # (B, heads, T, d)
    of_cells = (part.expand(len(normed), -1, -1, -1) for part in _keys_and_values(attention, cells[None]))
    keys, values = (
        torch.cat(parts, dim=2) for parts in zip(seen, (attention.k_norm(keys), values), of_cells, strict=True)
    )
    attended = F.scaled_dot_product_attention(attention.q_norm(queries), keys, values, attn_mask=mask)
    attended = attention.norm(attended.transpose(1, 2).flatten(2))  # (B, T, heads * d)
    if attention.gate is not None:
        attended = attended * attention.gate(normed).sigmoid()
    return mlp_half(block, class_tokens + branch(block, attention.proj(attended), 1))


def _keys_and_values(attention: Any, normed: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - timm's
    """Keys and values ``(B, heads, M, d)`` of what nobody asks for queries, ``(B, M, D)``."""
    width, bias = attention.attn_dim, attention.qkv.bias
    projected = F.linear(normed, attention.qkv.weight[width:], None if bias is None else bias[width:])
    keys, values = _heads(projected, attention, 2)
    return attention.k_norm(keys), values


def _heads(projected: Tensor, attention: Any, parts: int) -> tuple[Tensor, ...]:  # noqa: ANN401 - timm's
    """``(B, M, parts * heads * d)`` to as many ``(B, heads, M, d)``."""
    split = projected.reshape(*projected.shape[:2], parts, attention.num_heads, attention.head_dim)
    return tuple(split.permute(2, 0, 3, 1, 4))


def _own_alone(cells: list[int], seen: int, device: torch.device) -> Tensor | None:
    """Which keys a task sees, ``(T, seen + T + M)`` bool: the image, its own class token and cells. None if all."""
    tasks = torch.arange(len(cells), device=device)
    if len(cells) == 1:
        return None
    owner = torch.cat([tasks, *(tasks[place].expand(count) for place, count in enumerate(cells))])
    own = owner[None] == tasks[:, None]
    return torch.cat([own.new_ones(len(cells), seen), own], dim=1)

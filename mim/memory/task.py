"""What a frozen ViT learns for one task."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim.randomness import keyed_generator


class Task(nn.Module):
    """A class token, memory cells for every block, and a classifier: ``depth * cells * D + D + head`` numbers.

    The class token starts as the model's own, with its position, so that without memory it sees what that sees; cells
    are drawn with deviation 0.02, the classifier almost zero (2e-5).

    Args:
        vit: the model that is adapted; only its shape and class token are read.
        cells: memory cells in each block; 0 for none.
        class_names: in the order of the answers.
        seed: of what is drawn.
        normed: cells pass through the norm of their block, as tokens do; otherwise they come behind it.
    """

    def __init__(
        self, vit: VisionTransformer, cells: int, class_names: Sequence[str], seed: int = 0, normed: bool = True
    ) -> None:
        super().__init__()
        self.class_names, self.normed = tuple(class_names), normed
        generator = keyed_generator(seed, "memory")
        self.class_token = nn.Parameter(_own_class_token(vit, generator))
        self.memory = nn.Parameter(_drawn((len(vit.blocks), cells, vit.embed_dim), 0.02, generator))
        self.head = nn.Linear(vit.embed_dim, len(self.class_names))
        self.head.weight.data = _drawn(self.head.weight.shape, 2e-5, generator)
        nn.init.zeros_(self.head.bias)

    @property
    def cells(self) -> int:
        """Memory cells in each block."""
        return self.memory.shape[1]


def _own_class_token(vit: VisionTransformer, generator: torch.Generator) -> Tensor:
    """``(1, 1, D)`` as it enters the first block; drawn for models without one."""
    if vit.cls_token is None:
        return _drawn((1, 1, vit.embed_dim), 0.02, generator)
    token = vit.cls_token.detach().clone()
    if vit.pos_embed is not None and not vit.no_embed_class:
        token += vit.pos_embed[:, :1].detach()
    with torch.no_grad():
        return cast(Tensor, cast(Any, vit.norm_pre)(token)).clone()


def _drawn(shape: Sequence[int], deviation: float, generator: torch.Generator) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(*shape), std=deviation, generator=generator)

"""What makes a token worth keeping: every score gives ``(B, K)`` float32, higher is kept."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.randomness import RowGenerator, derive_seed
from mim.reduction.attention import Attending
from mim.reduction.schedule import call_of
from mim.reduction.similarity import product
from mim.reduction.tokens import Tokens


class Score(nn.Module):
    """Ranks the patch tokens.

    Attributes:
        reads_attention: needs the queries and keys of the block.
        needs_class_token: asks what the class token looks at.
        positive: never below zero, so that it can weigh a mean.
    """

    reads_attention: ClassVar[bool] = True
    needs_class_token: ClassVar[bool] = False
    positive: ClassVar[bool] = False

    def forward(self, tokens: Tokens, attending: Attending | None, layer: int) -> Tensor:
        """Score every patch token of ``tokens``, ``(B, K)``."""
        raise NotImplementedError

    def cost(self, patches: int, dim: int, head_dim: int) -> int:
        """Multiply-adds per image of scoring ``patches`` tokens."""
        return 0

    def __repr__(self) -> str:
        """The call that builds it."""
        return call_of(self)


class ClassAttention(Score):
    """How much the class token attends to a token, mean over heads (EViT, arXiv:2202.07800).

    In an encoder pretrained by masking alone the class token has learnt from no label: an untested score there.
    """

    needs_class_token = True
    positive = True

    def forward(self, tokens: Tokens, attending: Attending | None, layer: int) -> Tensor:
        """See :meth:`Score.forward`."""
        assert attending is not None
        return attending.class_attention()

    def cost(self, patches: int, dim: int, head_dim: int) -> int:
        """One row of attention."""
        return patches * dim


class ReceivedAttention(Score):
    """How much patches attend to a token: the stand-in for :class:`ClassAttention` in models without class token.

    Args:
        rows: patches that are asked, spread evenly over the sequence; None asks all.
    """

    positive = True

    def __init__(self, rows: int | None = 16) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, tokens: Tokens, attending: Attending | None, layer: int) -> Tensor:
        """See :meth:`Score.forward`."""
        assert attending is not None
        return attending.received_attention(self.rows)

    def cost(self, patches: int, dim: int, head_dim: int) -> int:
        """``rows`` rows of attention."""
        return min(self.rows or patches, patches) * patches * dim


class RandomScore(Score):
    """Pure chance, what every other score has to beat: the same draw for all images, a fresh one for each in training.

    Args:
        seed: of the draw used in evaluation.
    """

    reads_attention = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed, self.key = seed, derive_seed(seed, "reduction")

    def forward(self, tokens: Tokens, attending: Attending | None, layer: int) -> Tensor:
        """See :meth:`Score.forward`."""
        shape = tokens.x.shape[0], tokens.count
        if self.training:
            return torch.rand(shape, device=tokens.x.device)
        return RowGenerator.for_rows(self.key, layer, 1, tokens.x.device).rand(tokens.count).expand(shape)


class Duplication(Score):
    """How little a token resembles a few pivots, those with the largest keys (DART, arXiv:2502.11494).

    The paper takes the least similar tokens pivot by pivot; here a token is as redundant as its most similar pivot
    makes it, which needs no loop. Pivots are always kept.

    Args:
        pivots: how many; the paper has 4 in the image.
    """

    def __init__(self, pivots: int = 4) -> None:
        super().__init__()
        self.pivots = pivots

    def forward(self, tokens: Tokens, attending: Attending | None, layer: int) -> Tensor:
        """See :meth:`Score.forward`."""
        assert attending is not None
        pivots = attending.key_norms().topk(min(self.pivots, tokens.count)).indices  # (B, pivots)
        unit = F.normalize(tokens.patches.float(), dim=-1)
        chosen = unit.gather(1, pivots[..., None].expand(-1, -1, unit.shape[2]))
        redundancy = product(unit, chosen.transpose(1, 2)).amax(dim=2)  # (B, K)
        return (-redundancy).scatter(1, pivots, 2.0)

    def cost(self, patches: int, dim: int, head_dim: int) -> int:
        """Cosines to the pivots."""
        return self.pivots * patches * dim

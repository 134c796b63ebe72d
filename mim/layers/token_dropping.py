"""Token dropping (arXiv:2203.13240, 2022, for BERT): only tokens of hard places go through the middle of an encoder.

There a word counts by the running loss of its vocabulary entry. Patches have no vocabulary: here a token counts by the
running mean error of its place in the image.
"""

import torch
from torch import Tensor, nn

from mim.distributed.collectives import sum_over_processes
from mim.patches import some_of

MOMENTUM = 0.99  # of the running mean


class PlaceErrors(nn.Module):
    """Running mean error of every place, and which tokens are important by it.

    Args:
        patches: places of an image, ``N``.
        share: of the tokens that go through the middle blocks.
    """

    mean: Tensor

    def __init__(self, patches: int, share: float) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("mean", torch.ones(patches))
        self._sums: Tensor | None = None  # of errors and of their numbers in the micro-batches of this step

    def important(self, tokens: Tensor) -> Tensor:
        """Those of ``tokens (B, K)``, places in the image, that go through the middle: ``(B, share * K)``.

        The result are numbers of tokens, 0 to ``K - 1``, in their order; of equal places the first.
        """
        count = max(1, round(self.share * tokens.shape[1]))
        numbers = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return some_of(numbers, count, -self.mean[tokens])

    @torch.no_grad()
    def add(self, error: Tensor, places: Tensor, weights: Tensor | None = None) -> None:
        """Takes note of errors at places, ``(B, M)`` each, but of those whose ``weights (B, M, dim)`` are all 0."""
        rows = torch.stack([error.detach().float(), torch.ones_like(error, dtype=torch.float32)])  # (2, B, M)
        rows = rows if weights is None else rows * weights.amax(dim=-1)
        # No row has a place twice, so that a GPU adds in one order.
        spread = rows.new_zeros(2, len(places), len(self.mean)).scatter(2, places.expand(2, -1, -1), rows)
        sums = spread.sum(dim=1)  # (2, N)
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def update(self, unless: Tensor) -> None:
        """Moves the means by what the processes have noted at this step.

        Args:
            unless: scalar bool; nothing moves where it is True.
        """
        if self._sums is None:
            return
        error, count = sum_over_processes(self._sums)
        self._sums = None
        stays = unless | (count == 0)
        self.mean.lerp_(torch.where(stays, self.mean, error / count.clamp(min=1)), 1 - MOMENTUM)

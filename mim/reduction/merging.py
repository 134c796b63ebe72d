"""Merging: similar tokens become one, their mean weighted by how many patches each stands for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.patches import gather_tokens
from mim.reduction.attention import Attending
from mim.reduction.base import TokenReduction
from mim.reduction.pruning import split
from mim.reduction.schedule import Schedule
from mim.reduction.similarity import product
from mim.reduction.tokens import Tokens


class ToMe(TokenReduction):
    """Merges the most similar pairs between two halves of the sequence (ToMe, arXiv:2210.09461).

    Tokens at even places of the whole sequence each propose their most similar one at odd places, by the cosine of
    their mean keys; the best proposals are carried out. No prefix token takes part, where the reference lets all but
    the class and distillation token merge.

    Args:
        schedule: how many tokens each block leaves; at most every second one can go at once.
        proportional: merged tokens are attended to by their size. On for models trained with labels; off for weights of
            a masked autoencoder that were not fine-tuned with merging, says the reference.
        reference_order: unmerged tokens of the first half go on as the reference leaves them: in raster order if there
            is a class token, otherwise from the best proposal to the worst. In raster order always if not. The order
            decides which tokens propose in the next block, so that other tokens merge from the second block on.
    """

    def __init__(self, schedule: Schedule, proportional: bool = True, reference_order: bool = False) -> None:
        super().__init__(schedule, proportional=proportional)
        self.reference_order = reference_order

    def left(self, patches: int, layer: int, depth: int, grid: tuple[int, int] | None) -> int:
        """Never less than half."""
        return max(super().left(patches, layer, depth, grid), patches - patches // 2)

    def cost(self, before: int, after: int, dim: int, head_dim: int) -> int:
        """Cosines between the halves."""
        return (before // 2) * (before - before // 2) * head_dim

    def reduce(self, tokens: Tokens, attending: Attending | None, count: int, layer: int) -> Tokens:
        """See :meth:`TokenReduction.reduce`."""
        assert attending is not None
        keys = F.normalize(attending.mean_keys().detach(), dim=-1)  # (B, K, d)
        by_similarity = self.reference_order and not tokens.num_prefix
        return merge_pairs(tokens, keys, tokens.count - count, by_similarity)


def merge_pairs(tokens: Tokens, features: Tensor, pairs: int, by_similarity: bool = False) -> Tokens:
    """Carries out the ``pairs`` best of the merges that every second token proposes.

    Args:
        tokens: at least two patch tokens per pair.
        features: ``(B, K, d)`` of unit length, what similarity is measured by.
        pairs: merges.
        by_similarity: see :func:`best_pairs`.
    """
    # Parity counts from the start of the sequence, prefix and all.
    return tokens.merge(*best_pairs(features, pairs, tokens.num_prefix % 2, by_similarity))


def best_pairs(
    features: Tensor, pairs: int, first: int = 0, by_similarity: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``pairs`` best of the merges that every second token proposes, as :meth:`Tokens.merge` takes them.

    Args:
        features: ``(B, K, d)`` of unit length, what similarity is measured by; two tokens per pair or more.
        pairs: merges.
        first: 0 if the tokens at even places propose, 1 if those at odd ones do.
        by_similarity: those that proposed and stay go on from the best proposal to the worst, not in raster order.

    Returns:
        ``(B, K - pairs)`` tokens that go on, ``(B, pairs)`` those that are folded in, ``(B, pairs)`` their place among
        the first.
    """
    if not pairs:  # nor need there be any two tokens
        everything = torch.arange(features.shape[1], device=features.device).expand(features.shape[0], -1)
        return everything, everything[:, :0], everything[:, :0]
    best, partner = product(features[:, first::2], features[:, 1 - first :: 2].transpose(1, 2)).max(dim=2)
    order = best.topk(best.shape[1]).indices
    merged, alone = order[:, :pairs], order[:, pairs:]  # places among those that propose
    alone = alone if by_similarity else alone.sort().values
    others = torch.arange(1 - first, features.shape[1], 2, device=order.device).expand(order.shape[0], -1)
    centre = torch.cat([2 * alone + first, others], dim=1)
    return centre, 2 * merged + first, alone.shape[1] + partner.gather(1, merged)


class DominantContextual(TokenReduction):
    """Keeps what the class token looks at, and summarises the rest in a few tokens (VisionZip, arXiv:2412.04467).

    Of the rest, evenly spread ones are targets, and all others join the target with the most similar keys. A token in
    the middle of a network must stay of its kind, so contextual tokens are means; the paper's sums feed a projector.

    Args:
        schedule: how many tokens each block leaves.
        contextual: share of them that summarise; the paper has 10 of 64.
    """

    needs_class_token = True

    def __init__(self, schedule: Schedule, contextual: float = 0.15) -> None:
        super().__init__(schedule)
        if not 0 < contextual < 1:
            raise ValueError(f"contextual {contextual} is outside (0, 1)")
        self.contextual = contextual

    def cost(self, before: int, after: int, dim: int, head_dim: int) -> int:
        """A row of attention, and cosines of the rest to the targets."""
        targets = self._targets(after)
        return before * dim + (before - after) * targets * head_dim

    def _targets(self, count: int) -> int:
        return max(1, round(self.contextual * count))

    def reduce(self, tokens: Tokens, attending: Attending | None, count: int, layer: int) -> Tokens:
        """See :meth:`TokenReduction.reduce`."""
        assert attending is not None
        targets = self._targets(count)
        dominant, rest = split(attending.class_attention().detach(), count - targets)
        stride = rest.shape[1] // targets
        rows = rest[:, : targets * stride].reshape(len(rest), targets, stride)
        chosen = rows[:, :, 0]  # (B, targets)
        source = torch.cat([rows[:, :, 1:].flatten(1), rest[:, targets * stride :]], dim=1)
        keys = F.normalize(attending.mean_keys().detach(), dim=-1)
        similarity = product(gather_tokens(keys, source), gather_tokens(keys, chosen).transpose(1, 2))
        target = dominant.shape[1] + similarity.argmax(dim=2)
        return tokens.merge(torch.cat([dominant, chosen], dim=1), source, target)

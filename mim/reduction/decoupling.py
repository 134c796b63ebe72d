"""Decouple and merge: what the class token looks at is merged in pairs, all else in clusters (BAT, arXiv:2211.11315).

The paper's repository holds no code of the model; this is what its abstract and figure say, with density peaks
(DPC-KNN, as in arXiv:2204.08680) for the clusters. Shares of clusters and pairs are ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.patches import gather_tokens
from mim.reduction.attention import Attending
from mim.reduction.base import TokenReduction
from mim.reduction.merging import best_pairs
from mim.reduction.pruning import split
from mim.reduction.schedule import Schedule
from mim.reduction.similarity import squared_distances
from mim.reduction.tokens import Tokens


class DecoupleAndMerge(TokenReduction):
    """Keeps attentive tokens apart from inattentive ones, and diversity in both.

    The most similar pairs of attentive tokens become their mean. Inattentive tokens become clusters around the densest
    of them, means weighted by the attention of the class token.

    Args:
        schedule: how many tokens each block leaves.
        clusters: share of these that are clusters of inattentive tokens.
        pairs: share of these that are two attentive ones.
    """

    needs_class_token = True

    def __init__(self, schedule: Schedule, clusters: float = 0.3, pairs: float = 0.1) -> None:
        super().__init__(schedule)
        if not 0 < clusters < 1 or not 0 <= pairs <= 1 - clusters:
            raise ValueError(f"clusters {clusters} and pairs {pairs} are not two shares of the tokens that are left")
        self.clusters, self.pairs = clusters, pairs

    def cost(self, before: int, after: int, dim: int, head_dim: int) -> int:
        """A row of attention, distances between inattentive tokens, cosines between attentive ones."""
        attentive, _, _ = self._parts(before, after)
        rest = before - attentive
        return before * dim + rest * rest * dim + (attentive // 2) * (attentive - attentive // 2) * head_dim

    def _parts(self, before: int, after: int) -> tuple[int, int, int]:
        """Attentive tokens, clusters of the others, and pairs of the former."""
        clusters = max(1, round(self.clusters * after))
        alone = after - clusters
        pairs = min(round(self.pairs * after), before - after, alone)
        return alone + pairs, clusters, pairs

    def reduce(self, tokens: Tokens, attending: Attending | None, count: int, layer: int) -> Tokens:
        """See :meth:`TokenReduction.reduce`."""
        assert attending is not None
        many, clusters, pairs = self._parts(tokens.count, count)
        attention = attending.class_attention().detach().float()
        attentive, rest = split(attention, many)
        keys = F.normalize(attending.mean_keys().detach(), dim=-1)
        centre, source, target = best_pairs(gather_tokens(keys, attentive), pairs)  # places among the attentive
        peaks, others, peak = density_peaks(gather_tokens(tokens.patches.detach().float(), rest), clusters)
        # A group takes its weights from one kind alone, so that the two need not be of one scale.
        weight = attention.scatter(1, attentive, tokens.sizes.gather(1, attentive))
        return tokens.merge(
            torch.cat([attentive.gather(1, centre), rest.gather(1, peaks)], dim=1),
            torch.cat([attentive.gather(1, source), rest.gather(1, others)], dim=1),
            torch.cat([target, centre.shape[1] + peak], dim=1),
            weight,
        )


def density_peaks(points: Tensor, count: int, neighbours: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster centres that lie dense and far from anything denser, and the nearest of them for all other points.

    Args:
        points: ``(B, R, D)``.
        count: clusters, up to ``R``.
        neighbours: nearest points, itself among them, that tell how dense it is around a point.

    Returns:
        Centres ``(B, count)``, all others ``(B, R - count)``, and for each of these its place among the centres.
    """
    size = points.shape[1]
    distances = squared_distances(points, points) / points.shape[2]  # (B, R, R)
    nearest = distances.topk(min(neighbours, size), largest=False).values
    density = (-nearest.mean(dim=2)).exp()
    number = torch.arange(size, device=points.device)
    denser = (density[:, None] > density[..., None]) | (
        (density[:, None] == density[..., None]) & (number < number[:, None])  # of equals the first is the densest
    )
    furthest = distances.amax(dim=(1, 2))[:, None, None]
    gap = torch.where(denser, distances, furthest).amin(dim=2).sqrt()  # (B, R)
    centres, others = split(density * gap, count)
    to_centres = gather_tokens(distances, others).gather(2, centres[:, None].expand(-1, others.shape[1], -1))
    return centres, others, to_centres.argmin(dim=2)

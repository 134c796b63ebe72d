"""Similar tokens of an image joined into groups, round by round (arXiv:2404.09894), by repeated bipartite matching."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.patches import gather_tokens


def merge_counts(patches: int, merged: int, rounds: int) -> list[int]:
    """How many tokens each round takes away: equal shares of ``merged``, never more than half of what is left.

    The share is rounded up, and down where that would be more than there are patches.
    """
    share = -(-merged // rounds)
    share = merged // rounds if share * rounds > patches else share
    counts = []
    for _ in range(rounds):
        counts.append(min(share, patches // 2))
        patches -= counts[-1]
    return counts


@torch.no_grad()
def morph(tokens: Tensor, counts: list[int], draws: Tensor) -> Tensor:
    """The group of every token, ``(B, N)`` int64 from 0 to ``G - 1``, ``G = N - sum(counts)``.

    In a round the groups are split into two halves at random; the likeliest pairs of one of the first half and its
    nearest, by cosine of their means, of the second become one group.

    Args:
        tokens: ``(B, N, C)``, by which groups are judged.
        counts: pairs joined in each round, at most half of the groups there are.
        draws: ``(B, rounds, N)`` random numbers on [0, 1).
    """
    with torch.autocast(tokens.device.type, enabled=False):
        tokens, groups = tokens.float(), tokens.shape[1]
        assign = torch.arange(groups, device=tokens.device).expand(len(tokens), -1)  # (B, N)
        for number, count in enumerate(counts):
            if not count:
                continue
            means = group_means(tokens, assign, groups)[0]
            order = draws[:, number, :groups].argsort(dim=1)
            first, second = order.tensor_split([groups // 2], dim=1)
            own, other = (F.normalize(gather_tokens(means, half), dim=-1) for half in (first, second))
            likeness, nearest = (own @ other.transpose(1, 2)).max(dim=2)  # (B, groups // 2)
            joined, kept = likeness.argsort(dim=1, descending=True).tensor_split([count], dim=1)
            left = torch.cat([second, first.gather(1, kept)], dim=1)  # (B, groups - count), groups that keep a name
            names = torch.empty_like(order).scatter_(
                1, left, torch.arange(left.shape[1], device=tokens.device).expand_as(left)
            )
            names.scatter_(1, first.gather(1, joined), nearest.gather(1, joined))
            assign, groups = names.gather(1, assign), groups - count
    return assign


def group_means(tokens: Tensor, assign: Tensor, groups: int, measured: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of the tokens of every group, ``(B, G, C)``, and how many it has, ``(B, G)``.

    Args:
        tokens: ``(B, N, C)``.
        assign: ``(B, N)`` the group of each.
        groups: how many there are, ``G``.
        measured: ``(B, N)`` bool, which tokens count; all if not given.
    """
    member = (assign[:, None, :] == torch.arange(groups, device=assign.device)[:, None]).to(tokens.dtype)  # (B, G, N)
    member = member if measured is None else member * measured[:, None]
    sizes = member.sum(dim=2)
    return (member @ tokens) / sizes.clamp(min=1)[..., None], sizes

"""Clustering on the grid for dense tasks: fewer tokens from one block on, and every patch rebuilt at the end."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from mim.reduction.attention import Attending
from mim.reduction.base import TokenReduction
from mim.reduction.schedule import Schedule
from mim.reduction.similarity import product, squared_distances
from mim.reduction.tokens import Tokens


class GridClustering(TokenReduction):
    """Soft clusters that stay on a grid, and patches blended from the nearest of them (Expedite, arXiv:2210.01035).

    Needs no training. Clusters start as means of grid cells; a patch belongs to those around its own cell, by
    ``exp(-tau ||x - c||^2)``. The reference divides the weights of the reconstruction by their L2 norm, which enlarges
    features several times; here they sum to 1.

    Args:
        schedule: the first block that leaves fewer tokens is the one that clusters, once. Its number is rounded to
            cells of the grid's proportions.
        iterations: of moving clusters to the mean of their patches.
        window: cells on a side around a patch's own that it may belong to.
        neighbours: clusters that a patch is rebuilt from.
        tau: how fast a weight falls with the squared distance, 0.01 to 0.02 in the paper, in units of its models'
            features; unless given, 4 over the mean squared distance between patches and the clusters around them.
    """

    reads_attention = False

    def __init__(
        self,
        schedule: Schedule,
        iterations: int = 5,
        window: int = 5,
        neighbours: int = 20,
        tau: float | None = None,
    ) -> None:
        super().__init__(schedule, place="after")
        self.iterations, self.window, self.neighbours, self.tau = iterations, window, neighbours, tau

    def left(self, patches: int, layer: int, depth: int, grid: tuple[int, int] | None) -> int:
        """Whole cells, and nothing more once there are clusters."""
        if grid is None:
            raise ValueError("clusters live on the grid of all patches; they cannot follow a mask that drops some")
        wanted = super().left(patches, layer, depth, grid)
        if wanted == patches or patches < grid[0] * grid[1]:
            return patches
        return math.prod(cells(grid, wanted))

    def cost(self, before: int, after: int, dim: int, head_dim: int) -> int:
        """Means and distances at the start and of every iteration; the blend of dense features is not counted."""
        return (2 * self.iterations + 2) * before * after * dim

    def reduce(self, tokens: Tokens, attending: Attending | None, count: int, layer: int) -> Tokens:
        """See :meth:`TokenReduction.reduce`."""
        assert tokens.grid is not None
        shape = cells(tokens.grid, count)
        patches = tokens.patches.float()
        near = neighbourhood(tokens.grid, shape, self.window, patches.device)  # (N, K) bool
        clusters = product(pooling(tokens.grid, shape, patches.device), patches)  # (B, K, D)
        distances = squared_distances(patches, clusters)
        tau = self._tau(distances, near)
        for _ in range(self.iterations):
            member = (-tau * distances).masked_fill(~near, -math.inf).softmax(dim=2)
            clusters = product(member.transpose(1, 2), patches) / member.sum(dim=1)[..., None].clamp(min=1e-12)
            distances = squared_distances(patches, clusters)
        nearest = distances.topk(min(self.neighbours, count), largest=False)
        weights = torch.zeros_like(distances).scatter(2, nearest.indices, (-tau * nearest.values).softmax(dim=2))
        x = torch.cat([tokens.x[:, : tokens.num_prefix], clusters.to(tokens.x.dtype)], dim=1)
        own = distances.masked_fill(~near, math.inf).argmin(dim=2)
        centres = pooling(tokens.grid, shape, patches.device).argmax(dim=1).expand(x.shape[0], -1)
        return replace(tokens, x=x, assign=own, places=centres, merged=True, blend=weights)

    def _tau(self, distances: Tensor, near: Tensor) -> Tensor:
        """``(B, 1, 1)``; a function of each image alone, so that it does not matter what else is in the batch."""
        if self.tau is not None:
            return torch.full_like(distances[:, :1, :1], self.tau)
        mean = (distances * near).sum(dim=(1, 2), keepdim=True) / near.sum()
        return 4 / mean.clamp(min=1e-12)


def cells(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """About ``count`` cells in the proportions of ``grid (h, w)``, never more than there are patches on a side."""
    share = math.sqrt(count / (grid[0] * grid[1]))
    height, width = (max(1, min(side, round(side * share))) for side in grid)
    return height, width


def pooling(grid: tuple[int, int], shape: tuple[int, int], device: torch.device) -> Tensor:
    """The mean of every cell as a matrix ``(K, N)``: adaptive average pooling, in a form that any size exports in."""
    rows, columns = (_line(side, parts, device) for side, parts in zip(grid, shape, strict=True))
    return (rows[:, None, :, None] * columns[None, :, None, :]).flatten(2).flatten(0, 1)


def _line(side: int, parts: int, device: torch.device) -> Tensor:
    place, part = torch.arange(side, device=device), torch.arange(parts, device=device)[:, None]
    inside = (place >= part * side // parts) & (place < -(-(part + 1) * side // parts))  # (parts, side)
    return inside / inside.sum(dim=1, keepdim=True)


def neighbourhood(grid: tuple[int, int], shape: tuple[int, int], window: int, device: torch.device) -> Tensor:
    """Whether a patch may belong to a cluster, ``(N, K)`` bool: its own cell and those around it."""
    near = []
    for side, parts in zip(grid, shape, strict=True):
        own = torch.arange(side, device=device)[:, None] * parts // side
        near.append((own - torch.arange(parts, device=device)).abs() <= window // 2)  # (side, parts)
    rows, columns = near
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)

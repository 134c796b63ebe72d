"""Published reductions as compositions of this folder's parts, each with the schedules that it is used with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mim.reduction.base import TokenReduction
from mim.reduction.clustering import GridClustering
from mim.reduction.cropr import Cropr
from mim.reduction.macs import count_macs
from mim.reduction.merging import DominantContextual, ToMe
from mim.reduction.pruning import TopKPruning
from mim.reduction.schedule import KeepRate, PerBlock, Schedule
from mim.reduction.scores import ClassAttention, Duplication, RandomScore


def staged(patches: int, depth: int) -> list[Schedule]:
    """Keep rates at a quarter, a half and three quarters of the depth."""
    return [KeepRate(percent / 100) for percent in range(1, 101)]


def once(patches: int, depth: int) -> list[Schedule]:
    """Keep rates at a quarter of the depth alone."""
    return [KeepRate(percent / 100, at=[depth // 4]) for percent in range(1, 101)]


def per_block(patches: int, depth: int) -> list[Schedule]:
    """The same number at every block."""
    return [PerBlock(r) for r in range(patches // 2)]


@dataclass(frozen=True)
class Recipe:
    """A reduction with a knob.

    Args:
        build: the reduction for a schedule and a timm ViT.
        schedules: all that the knob can be set to, for so many patches and blocks.
        trained: its score is drawn at random until it is trained: speed means something, accuracy does not.
    """

    build: Callable[[Schedule, Any], TokenReduction]
    schedules: Callable[[int, int], list[Schedule]] = staged
    trained: bool = False

    def fit(self, vit: Any, share: float) -> TokenReduction:  # noqa: ANN401 - a timm ViT
        """The reduction whose multiply-adds come nearest to a share of the whole model's."""
        wanted = share * count_macs(vit).total
        height, width = vit.patch_embed.grid_size
        schedules = self.schedules(height * width, len(vit.blocks))

        def distance(schedule: Schedule) -> float:
            with torch.device("meta"):  # to be counted, a trained scorer needs no storage
                return abs(count_macs(vit, self.build(schedule, vit)).total - wanted)

        return self.build(min(schedules, key=distance), vit)


def _cropr(schedule: Schedule, vit: Any) -> TokenReduction:  # noqa: ANN401 - a timm ViT
    assert isinstance(schedule, PerBlock)
    return Cropr(vit.embed_dim, len(vit.blocks), num_classes=1, r=schedule.r)


RECIPES = {
    "random": Recipe(lambda schedule, vit: TopKPruning(schedule, RandomScore())),
    "topk": Recipe(lambda schedule, vit: TopKPruning(schedule, ClassAttention())),
    "evit": Recipe(lambda schedule, vit: TopKPruning(schedule, ClassAttention(), fuse=True)),
    "dart": Recipe(lambda schedule, vit: TopKPruning(schedule, Duplication())),
    "visionzip": Recipe(lambda schedule, vit: DominantContextual(schedule)),
    "tome": Recipe(lambda schedule, vit: ToMe(schedule), per_block),
    "expedite": Recipe(lambda schedule, vit: GridClustering(schedule), once),
    "cropr": Recipe(_cropr, per_block, trained=True),
}
"""What is compared with each other; a config names classes instead."""

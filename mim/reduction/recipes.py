"""Published reductions as compositions of this folder's parts, each with the one knob that it is used with."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mim.errors import UserError
from mim.program import called, quoted
from mim.reduction.base import TokenReduction
from mim.reduction.clustering import GridClustering
from mim.reduction.cropr import Cropr
from mim.reduction.decoupling import DecoupleAndMerge
from mim.reduction.duplication import GreedyDuplication
from mim.reduction.dynamicvit import DynamicViT
from mim.reduction.early_exit import EarlyExit
from mim.reduction.macs import count_macs
from mim.reduction.merging import DominantContextual, ToMe
from mim.reduction.pruning import TopKPruning
from mim.reduction.schedule import KeepRate, PerBlock
from mim.reduction.scores import ClassAttention, Duplication, RandomScore
from mim.reduction.thresholds import LearnedThresholds
from mim.vit import without_weights


@dataclass(frozen=True)
class Knob:
    """What a recipe is turned up and down by.

    Args:
        unit: of its values, in words.
        setting: what a value means for a model of so many blocks, as the recipe's ``build`` takes it.
        values: all that it can be set to, for so many patches.
        example: a usual value.
    """

    unit: str
    setting: Callable[[float, int], Any]
    values: Callable[[int], Sequence[float]]
    example: float


def _percents(patches: int) -> list[float]:
    return [percent / 100 for percent in range(1, 101)]


STAGED = Knob(
    "the share of tokens kept at a quarter, a half and three quarters of the depth",
    lambda keep, depth: KeepRate(keep),
    _percents,
    0.7,
)
ONCE = Knob(
    "the share of tokens kept at a quarter of the depth",
    lambda keep, depth: KeepRate(keep, at=[depth // 4]),
    _percents,
    0.4,
)
PER_BLOCK = Knob(
    "the whole number of tokens that every block takes away",
    lambda r, depth: PerBlock(_whole(r)),
    lambda patches: range(patches // 2),
    8,
)


KEEP = Knob("the share of tokens that each stage keeps", lambda keep, depth: keep, _percents, 0.7)
PRICE = Knob(
    "the weight of the share of tokens that stay in the loss", lambda weight, depth: weight, lambda patches: [0.1], 0.1
)


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError(f"{value:g} is not a whole number")
    return int(value)


class Labels(NamedTuple):
    """What a trained reduction learns from.

    Args:
        classes: how many there are.
        masks: every pixel has one, not every image.
    """

    classes: int
    masks: bool = False


@dataclass(frozen=True)
class Recipe:
    """A reduction with a knob.

    Args:
        build: the reduction for what its knob is set to, a timm ViT and what it will learn from.
        knob: what it is turned by.
        trained: its score is drawn at random until it is trained, which takes labels.
        masks: the labels must be masks.
        shortens: sequences get shorter by numbers that are known beforehand, so that speed can be measured.
    """

    build: Callable[[Any, Any, Labels], TokenReduction]
    knob: Knob = STAGED
    trained: bool = False
    masks: bool = False
    shortens: bool = True

    def at(self, vit: Any, value: float, labels: Labels = Labels(1)) -> TokenReduction:  # noqa: ANN401, B008
        """The reduction of a timm ViT with its knob at ``value``."""
        return self.build(self.knob.setting(value, len(vit.blocks)), vit, labels)

    def fit(self, vit: Any, share: float, labels: Labels = Labels(1)) -> TokenReduction:  # noqa: ANN401, B008
        """The reduction whose multiply-adds come nearest to a share of the whole model's."""
        wanted = share * count_macs(vit).total
        height, width = vit.patch_embed.grid_size

        def distance(value: float) -> float:
            with without_weights():  # to be counted, a trained scorer needs no storage
                return abs(count_macs(vit, self.at(vit, value)).total - wanted)

        return self.at(vit, min(self.knob.values(height * width), key=distance), labels)


def _cropr(schedule: PerBlock, vit: Any, labels: Labels) -> TokenReduction:  # noqa: ANN401 - a timm ViT
    height, width = vit.patch_embed.grid_size
    queries = height * width if labels.masks else 1
    return Cropr(vit.embed_dim, len(vit.blocks), labels.classes, schedule.r, queries, labels.masks)


def _dynamicvit(keep: float, vit: Any, labels: Labels) -> TokenReduction:  # noqa: ANN401 - a timm ViT
    depth = len(vit.blocks)
    before = sorted({max(1, depth // 4), max(1, depth // 2), max(1, 3 * depth // 4)})
    return DynamicViT(vit.embed_dim, keep, at=[layer - 1 for layer in before])


def _dtop(keep: float, vit: Any, labels: Labels) -> TokenReduction:  # noqa: ANN401 - a timm ViT
    thirds = sorted({max(1, len(vit.blocks) // 3), max(1, 2 * len(vit.blocks) // 3)})
    return EarlyExit(vit.embed_dim, labels.classes, at=[layer - 1 for layer in thirds], keep=keep)


RECIPES = {
    "random": Recipe(lambda schedule, vit, labels: TopKPruning(schedule, RandomScore())),
    "topk": Recipe(lambda schedule, vit, labels: TopKPruning(schedule, ClassAttention())),
    "evit": Recipe(lambda schedule, vit, labels: TopKPruning(schedule, ClassAttention(), fuse=True)),
    "dart": Recipe(lambda schedule, vit, labels: TopKPruning(schedule, Duplication())),
    "dart_greedy": Recipe(lambda schedule, vit, labels: GreedyDuplication(schedule)),
    "bat": Recipe(lambda schedule, vit, labels: DecoupleAndMerge(schedule)),
    "visionzip": Recipe(lambda schedule, vit, labels: DominantContextual(schedule)),
    "tome": Recipe(lambda schedule, vit, labels: ToMe(schedule), PER_BLOCK),
    "expedite": Recipe(lambda schedule, vit, labels: GridClustering(schedule), ONCE),
    "cropr": Recipe(_cropr, PER_BLOCK, trained=True),
    "dynamicvit": Recipe(_dynamicvit, KEEP, trained=True),
    "dtop": Recipe(_dtop, KEEP, trained=True, masks=True),
    "ltp": Recipe(lambda weight, vit, labels: LearnedThresholds(len(vit.blocks), weight), PRICE, True, shortens=False),
}
"""What is compared with each other, and what the command line knows by name; a config names classes."""


def recipe(name: str) -> Recipe:
    """The recipe of a name; an unknown one ends in a :class:`UserError`."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1) or [" | ".join(RECIPES)]
        raise UserError(f"--reduction {name}: there is no such reduction", hint=f"--reduction {near[0]}")
    return RECIPES[name]


def named_reduction(
    text: str,
    vit: Any,  # noqa: ANN401 - a timm ViT
    labels: Labels | None = None,
    weights: str = "WEIGHTS",
) -> TokenReduction:
    """What ``--reduction NAME`` or ``--reduction NAME:VALUE`` means for a model.

    Args:
        text: a name of :data:`RECIPES` and, behind a colon, what its knob is set to; half of the model's multiply-adds
            unless given.
        vit: a timm ViT.
        labels: what a trained reduction will learn from; None if nothing is going to be trained.
        weights: where the model comes from, for messages.

    Raises:
        UserError: if there is no such reduction or value, the model cannot be reduced by it, or it would need training.
    """
    name, _, value = text.partition(":")
    chosen = recipe(name)
    if chosen.trained and (labels is None or chosen.masks > labels.masks):
        kind, command = ("masks", f"{called('segment')} --finetune") if chosen.masks else ("labels", called("finetune"))
        raise UserError(
            f"--reduction {name}: its scores are random until they are trained with {kind}",
            hint=f"{command} --weights {quoted(weights)} --reduction {quoted(text)}",
        )
    try:
        known = labels or Labels(1)
        reduction = chosen.at(vit, float(value), known) if value else chosen.fit(vit, 0.5, known)
        reduction.check(vit)
    except ValueError as error:
        hint = f"--reduction {name}:{chosen.knob.example:g}   ({chosen.knob.unit})"
        raise UserError(f"--reduction {text}: {error}", hint=hint) from error
    except TypeError as error:
        raise UserError(f"--reduction {text}: {error}", hint="--reduction tome") from error
    return reduction

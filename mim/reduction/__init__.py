"""Token reductions: prune, merge or cluster the patch tokens of a timm ViT while it runs."""

from mim.reduction.base import TokenReduction
from mim.reduction.clustering import GridClustering
from mim.reduction.cropr import Cropr
from mim.reduction.decoupling import DecoupleAndMerge
from mim.reduction.distillation import distillation_loss
from mim.reduction.duplication import GreedyDuplication
from mim.reduction.dynamicvit import DynamicViT
from mim.reduction.early_exit import EarlyExit
from mim.reduction.merging import DominantContextual, ToMe
from mim.reduction.pruning import TopKPruning
from mim.reduction.recipes import Labels
from mim.reduction.schedule import Counts, KeepRate, PerBlock, Schedule
from mim.reduction.scores import ClassAttention, Duplication, RandomScore, ReceivedAttention, Score
from mim.reduction.thresholds import LearnedThresholds
from mim.reduction.tokens import Tokens
from mim.reduction.wrapper import TokenReducedViT

__all__ = [
    "ClassAttention",
    "Counts",
    "Cropr",
    "DecoupleAndMerge",
    "DominantContextual",
    "Duplication",
    "DynamicViT",
    "EarlyExit",
    "GreedyDuplication",
    "GridClustering",
    "KeepRate",
    "Labels",
    "LearnedThresholds",
    "PerBlock",
    "RandomScore",
    "ReceivedAttention",
    "Schedule",
    "Score",
    "ToMe",
    "TokenReducedViT",
    "TokenReduction",
    "Tokens",
    "TopKPruning",
    "distillation_loss",
]

"""Small models of every kind that can be reduced, and every reduction."""

import timm
import torch
from torch import nn

from mim.reduction import (
    ClassAttention,
    Counts,
    Cropr,
    DecoupleAndMerge,
    DominantContextual,
    Duplication,
    DynamicViT,
    EarlyExit,
    GreedyDuplication,
    GridClustering,
    KeepRate,
    LearnedThresholds,
    RandomScore,
    ReceivedAttention,
    ToMe,
    TopKPruning,
)

SMALL = {"img_size": 40, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
MODELS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer scale": ("deit3_small_patch16_224", {}),
    "normalised keys": ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True, "init_values": 1.0}),
    "SigLIP": ("vit_base_patch16_siglip_224", {}),
    "CLIP": ("vit_base_patch16_clip_224", {}),
    "EVA-02": ("eva02_tiny_patch14_224", {}),
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "rotary per head": ("vit_small_patch16_rope_mixed_224", {}),
}
ROTARY = ("EVA-02", "DINOv3", "rotary per head")
REDUCTIONS = {
    "random": lambda schedule: TopKPruning(schedule, RandomScore()),
    "received": lambda schedule: TopKPruning(schedule, ReceivedAttention(rows=4)),
    "duplication": lambda schedule: TopKPruning(schedule, Duplication(pivots=2)),
    "greedy duplication": lambda schedule: GreedyDuplication(schedule, pivots=2),
    "top-k": lambda schedule: TopKPruning(schedule, ClassAttention()),
    "fused": lambda schedule: TopKPruning(schedule, ClassAttention(), fuse=True),
    "fused mean": lambda schedule: TopKPruning(schedule, ClassAttention(), fuse=True, normalise=True),
    "rejoined": lambda schedule: TopKPruning(schedule, ClassAttention(), place="after", rejoin=True),
    "ToMe": ToMe,
    "contextual": DominantContextual,
    "decoupled": DecoupleAndMerge,
    "clusters": GridClustering,
}
MERGING = ("ToMe", "contextual", "decoupled", "clusters")
TRAINED = {
    "Cropr": lambda: Cropr(dim=16, depth=4, num_classes=5, r=4),
    "DynamicViT": lambda: DynamicViT(dim=16, keep=0.6, at=[0, 2]),
    "EarlyExit": lambda: EarlyExit(dim=16, num_classes=5, at=[0, 2], keep=0.6, context=1),
}
HIDING = {
    "thresholds": lambda: thresholds_of(0.038),
    "sure exit": lambda: EarlyExit(dim=16, num_classes=5, at=[0, 2], threshold=0.5, context=1),
}
EVERY = {name: lambda make=make: make(KeepRate(0.6)) for name, make in REDUCTIONS.items()} | TRAINED | HIDING
"""All reductions at work."""
IDLE = {name: lambda make=make: make(KeepRate(1.0)) for name, make in REDUCTIONS.items()} | {
    "Cropr": lambda: Cropr(dim=16, depth=4, num_classes=5, r=0),
    "DynamicViT": lambda: DynamicViT(dim=16, keep=1.0, at=[0, 2]),
    "EarlyExit": lambda: EarlyExit(dim=16, num_classes=5, at=[0, 2], keep=1.0),
    "sure exit": lambda: EarlyExit(dim=16, num_classes=5, at=[0, 2], threshold=1.0),
    "thresholds": lambda: thresholds_of(-1.0),
    "fixed thresholds": lambda: TopKPruning(Counts([25] * 4), ReceivedAttention(rows=None)),
}
"""All reductions with nothing to do."""


def thresholds_of(value):
    reduction = LearnedThresholds(depth=4)
    nn.init.constant_(reduction.thresholds, value)
    return reduction


def build(name, **changes):
    """A model whose weights are large enough for every part of it to matter."""
    model, kwargs = MODELS[name]
    vit = timm.create_model(model, **SMALL | kwargs | changes)
    torch.manual_seed(1)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.25)
    return vit.eval()


def fits(model, reduction):
    """Whether the reduction asks for a class token only where there is one."""
    asks = reduction in ("top-k", "fused", "fused mean", "rejoined", "contextual", "decoupled")
    return not asks or model not in ("no class token", "SigLIP")

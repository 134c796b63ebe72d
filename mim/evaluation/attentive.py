"""Attentive probes: what patch tokens hold when a small head may choose where to look.

``attentive`` is one transformer block that a learned query reads the tokens with (timm's pooling, as in V-JEPA,
arXiv:2404.08471). ``multi_query`` is the efficient variant of "Attention, Please!" (arXiv:2506.10178): several queries
attend to the tokens themselves, without key projection or block, and each fills its own part of the result.
Optimizer and learning rates are ours: AdamW without weight decay.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from mim.evaluation.bank import Bank
from mim.evaluation.batches import shuffled, steps_per_epoch
from mim.options.classification import ProbeRecipe
from mim.randomness import derive_seed
from mim.schedules import warmup_cosine

_HEAD_WIDTH = 64


class MultiQueryPooling(nn.Module):
    """``M`` learned queries, each of which gives ``D / M`` of the pooled numbers.

    Args:
        dim: width D of the tokens.
        queries: their number M, which divides D.
    """

    def __init__(self, dim: int, queries: int) -> None:
        super().__init__()
        if dim % queries:
            raise ValueError(f"{queries} queries do not divide the width {dim}")
        self.queries = nn.Parameter(torch.randn(queries, dim) * dim**-0.5)
        self.value = nn.Parameter(torch.randn(queries, dim, dim // queries) * dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, N, D)`` to ``(B, D)``."""
        attention = (tokens @ self.queries.T * tokens.shape[2] ** -0.5).softmax(1)  # (B, N, M)
        # Pooled before it is projected: M vectors instead of N go through the value map.
        pooled = attention.transpose(1, 2) @ tokens  # (B, M, D)
        return torch.einsum("bmd,mde->bme", pooled, self.value).flatten(1)


class AttentiveHeads(nn.Module):
    """L classifiers of one shape, side by side.

    Args:
        head: the first one; the others begin as its copies.
        count: their number L.
    """

    def __init__(self, head: nn.Module, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(deepcopy(head) for _ in range(count))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, L, classes)`` for ``(B, N, D)``."""
        return torch.stack([head(tokens) for head in self.heads], dim=1)


def fit_attentive(
    banks: Sequence[Bank],
    rows: Tensor,
    recipe: ProbeRecipe,
    classes: int,
    seed: int,
    device: torch.device | str = "cpu",
    after_epoch: Callable[[AttentiveHeads], None] | None = None,
) -> AttentiveHeads:
    """Trains a head per learning rate on banks of patch tokens; arguments as in :func:`fit_linear`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "attentive head"))
        heads = AttentiveHeads(_head(recipe, banks[0].features.shape[2], classes), len(recipe.rates)).to(device)
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads.heads, recipe.rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    per_epoch = steps_per_epoch(len(rows), recipe.batch_size)
    warmup, total, step = recipe.warmup_epochs * per_epoch, recipe.epochs * per_epoch, 0
    for epoch in range(recipe.epochs):
        heads.train()
        for tokens, labels in shuffled(banks, rows, recipe.batch_size, epoch, seed, device):
            for group, lr in zip(optimizer.param_groups, recipe.rates, strict=True):
                group["lr"] = lr * warmup_cosine(step, warmup, total, 1.0, 0.0)
            logits = heads(tokens)  # (B, L, classes)
            # Summed over heads: no head's gradient depends on another's.
            loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(len(groups))) * len(groups)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves this method without types
            optimizer.step()
            step += 1
        heads.eval()
        if after_epoch is not None:
            after_epoch(heads)
    return heads


def _head(recipe: ProbeRecipe, dim: int, classes: int) -> nn.Module:
    """Pooling, batch norm without affine parameters, linear map."""
    if recipe.head == "multi_query":
        pooling: nn.Module = MultiQueryPooling(dim, recipe.queries)
    else:
        pooling = AttentionPoolLatent(dim, num_heads=max(1, dim // _HEAD_WIDTH), mlp_ratio=4.0)
    return nn.Sequential(pooling, nn.BatchNorm1d(dim, eps=1e-6, affine=False), nn.Linear(dim, classes))

"""Classifiers on frozen features: trained at many learning rates at once, of which the best is chosen honestly."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mim.evaluation.attentive import fit_attentive
from mim.evaluation.bank import Bank
from mim.evaluation.linear_probe import LinearHeads, fit_linear
from mim.evaluation.splits import stratified_split
from mim.options.classification import ProbeRecipe

_ROWS = 1024
"""Rows whose logits are in memory at once."""


class Heads(Protocol):
    """Trained classifiers side by side."""

    def __call__(self, features: Tensor) -> Tensor:
        """Logits ``(B, L, classes)`` of L heads for ``(B, F)`` or ``(B, N, D)``."""
        ...


class Outcome(NamedTuple):
    """What the chosen head reaches on the reported images.

    Args:
        top1: share of images whose class has the largest logit.
        top5: share whose class is among the five largest.
        lr: the learning rate that was chosen.
        answers: ``(Q,)`` predicted classes.
        layer: what gave them, if it is linear, on the CPU.
    """

    top1: float
    top5: float
    lr: float
    answers: Tensor
    layer: nn.Linear | None = None


def probe_head(
    banks: Sequence[Bank],
    queries: Bank,
    recipe: ProbeRecipe,
    classes: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Outcome:
    """Trains heads on the banks and scores the best of them on the queries.

    Args:
        banks: features to learn from; with several, one per random crop, each epoch takes the next.
        queries: features to report on.
        recipe: how; ``select`` says whether the queries have a say in the choice.
        classes: number of classes.
        seed: of the initial weights, the order and the held-out part.
        device: where heads are trained.
    """
    fit = fit_linear if recipe.head == "linear" else fit_attentive
    labels = banks[0].labels
    everything = torch.arange(len(labels))
    if recipe.select == "on_test":
        best: list[Outcome] = []  # one at most: each has its layer with it

        def look(heads: Heads) -> None:
            scored = _score(heads, queries, recipe.rates, device)
            best[:] = [max([*best, *scored], key=lambda outcome: outcome.top1)]

        fit(banks, everything, recipe, classes, seed, device, after_epoch=look)
        return best[0]
    rates = recipe.rates
    if len(rates) > 1:
        kept, held = stratified_split(labels, 0.1, seed, "linear probe")
        heads = fit(banks, kept, recipe, classes, seed, device)
        scored = _score(heads, Bank(banks[0].features[held], labels[held]), rates, device)
        rates = (max(scored, key=lambda outcome: outcome.top1).lr,)
    chosen = replace(recipe, lrs=rates)
    return _score(fit(banks, everything, chosen, classes, seed, device), queries, rates, device)[0]


@torch.inference_mode()
def _score(heads: Heads, bank: Bank, rates: Sequence[float], device: torch.device | str) -> list[Outcome]:
    """One outcome per head."""
    ranked = []
    for rows in torch.split(bank.features, _ROWS):
        logits = heads(rows.to(device).float())  # (B, L, classes)
        ranked.append(logits.topk(min(5, logits.shape[-1])).indices.cpu())
    best = torch.cat(ranked)  # (Q, L, 5), the largest first
    hit = best == bank.labels[:, None, None]
    top1, top5 = hit[:, :, 0].double().mean(0), hit.any(2).double().mean(0)
    layers = [heads.alone(i).cpu() if isinstance(heads, LinearHeads) else None for i in range(len(rates))]
    return [Outcome(float(top1[i]), float(top5[i]), lr, best[:, i, 0], layers[i]) for i, lr in enumerate(rates)]

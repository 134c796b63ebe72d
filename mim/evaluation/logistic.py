"""Linear probe on frozen features: multinomial logistic regression, fitted to the optimum in seconds.

The papers train this classifier by SGD on augmented images for 90 to 100 epochs; here features are computed once,
without augmentation, and L-BFGS solves the convex problem. Another protocol: do not set its numbers beside theirs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.evaluation.splits import stratified_split

# Rows whose logits are in memory at once: for 1,000 classes 64 MiB.
_ROWS = 16384
_COMPARED = 1e-4
"""Gradient at which a fit is good enough to be compared with others; the one that counts goes on from the best."""


def linear_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    l2: Sequence[float] = (1.0, 1e-1, 1e-2, 1e-3),
    seed: int = 0,
) -> float:
    """Accuracy from 0 to 1 on the queries of :func:`linear_answers`; ``labels (Q,)`` are their true ones."""
    answers = linear_answers(bank, bank_labels, queries, l2, seed)
    return int((answers == labels.to(answers.device)).sum()) / len(answers)


def linear_answers(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, l2: Sequence[float] = (1.0, 1e-1, 1e-2, 1e-3), seed: int = 0
) -> Tensor:
    """Classes of the queries by a linear classifier fitted to the bank.

    The L2 strength is the one that does best on a tenth of the bank, held out by a key; the queries have no say in it.
    The classifier is then fitted again to the whole bank. Computed where the bank lies.

    Args:
        bank: ``(M, D)`` features to fit.
        bank_labels: ``(M,)`` labels from 0.
        queries: ``(Q, D)`` features to classify.
        l2: strengths to choose from, strongest first; see :func:`logistic_regression`.
        seed: names the held-out part.

    Returns:
        ``(Q,)`` classes.
    """
    strength, start = _best_l2(bank, bank_labels, l2, seed) if len(l2) > 1 else (l2[0], None)
    fitted, asked = standardise(bank, queries)
    return _answers(logistic_regression(fitted, bank_labels, strength, start), asked)


def standardise(bank: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Both as ``(.., D)`` float32, shifted and scaled by the bank's mean and deviation.

    MAE's batch norm without affine parameters, with the statistics of the whole bank; its epsilon 1e-6 keeps constant
    dimensions at zero instead of blowing up their rounding errors.
    """
    variance, mean = torch.var_mean(bank.float(), dim=0, correction=0)
    scale = (variance + 1e-6).rsqrt()
    return (bank.float() - mean) * scale, (queries.to(bank.device).float() - mean) * scale


def logistic_regression(
    features: Tensor, labels: Tensor, l2: float, start: Tensor | None = None, tolerance: float = 1e-5
) -> Tensor:
    """Weights that minimise mean cross-entropy plus ``l2 / 2`` times their squared norm, the bias left free.

    scikit-learn's ``LogisticRegression(C)`` is the same problem with ``C = 1 / (l2 * M)``; here a strength means the
    same for any number of images. The gradient is written out in pieces: bounded memory, and inference mode may be on.

    Args:
        features: ``(M, D)``, standardised.
        labels: ``(M,)`` labels from 0.
        l2: strength of the penalty per image.
        start: ``(D + 1, classes)`` weights to begin from, zero if absent.
        tolerance: no value of the gradient is larger at the end; scikit-learn stops at 1e-4.

    Returns:
        ``(D + 1, classes)`` weights, the bias in the last row.
    """
    design, targets = F.pad(features, (0, 1), value=1.0), labels.to(features.device)
    classes = int(targets.max()) + 1
    weight = features.new_zeros(design.shape[1], classes) if start is None else start.clone()
    penalty = torch.full_like(weight, l2)
    penalty[-1] = 0
    solver = torch.optim.LBFGS(
        [weight],
        max_iter=200,
        tolerance_grad=tolerance,
        tolerance_change=1e-8,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        loss = (penalty * weight.square()).sum() / 2
        weight.grad = penalty * weight
        for rows, truth in zip(torch.split(design, _ROWS), torch.split(targets, _ROWS), strict=True):
            log_probability = (rows @ weight).log_softmax(1)  # (rows, classes)
            loss = loss - log_probability.gather(1, truth[:, None]).sum() / len(design)
            residual = log_probability.exp().scatter_add_(1, truth[:, None], -torch.ones_like(rows[:, :1]))
            weight.grad.addmm_(rows.T, residual, alpha=1 / len(design))
        return loss

    solver.step(objective)  # type: ignore[no-untyped-call]  # torch leaves this method without types
    return weight


def _best_l2(bank: Tensor, labels: Tensor, l2: Sequence[float], seed: int) -> tuple[float, Tensor | None]:
    """The strength that does best on held-out rows, the stronger one of equals, and its weights to go on from.

    Each fit starts from the one before. There is nothing to go on from if the rows that were kept lack a class.
    """
    kept, held = stratified_split(labels, 0.1, seed, "linear probe")
    fitted, asked = standardise(bank[kept], bank[held])
    weight, weights, scores = None, [], []
    for strength in l2:
        weight = logistic_regression(fitted, labels[kept], strength, weight, _COMPARED)
        weights.append(weight)
        scores.append(int((_answers(weight, asked) == labels[held].to(asked.device)).sum()) / len(asked))
    best = scores.index(max(scores))
    return l2[best], weights[best] if weights[best].shape[1] == int(labels.max()) + 1 else None


def _answers(weight: Tensor, features: Tensor) -> Tensor:
    """The largest logit of every row; ``weight`` as from :func:`logistic_regression`."""
    return (features @ weight[:-1] + weight[-1]).argmax(1)

"""Assignments of tokens to prototypes that use all prototypes alike: Sinkhorn-Knopp (arXiv:1306.0895, 2006.09882)."""

import torch
from torch import Tensor

from mim.distributed.collectives import max_over_processes, sum_over_processes

_FLOOR = 1e-30
"""A prototype that no token comes near, within what float32 holds, gets a share of 0 instead of a division by 0."""


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, counted: Tensor | None = None, iterations: int = 3) -> Tensor:
    """Distributions over prototypes, near those of the logits, that together use every prototype equally often.

    ``exp(logits / temperature)`` is scaled in turns: every prototype's sum over the tokens of **all processes** to the
    same number, then every token's sum over the prototypes to 1. Each process may hold another number of tokens, or
    none. With ``(T, K)`` all tokens are balanced together (DINOv2, arXiv:2304.07193); with ``(B, N, K)`` the images at
    each of ``N`` places are, independently of other places (CAPI, arXiv:2502.08769).

    Nothing waits for the device. It computes in float32 under autocast, too, and holds one copy of the logits; only
    one factor for each prototype and each token changes from turn to turn.

    Args:
        logits: ``(T, ..., K)``, tokens first, prototypes last; what lies between is balanced apart.
        temperature: of the logits; the lower, the sharper the assignments.
        counted: ``(T, ...)`` bool, False for rows that only fill the tensor: they take no part in the balance, and
            their own assignments mean nothing, though they sum to 1. All count if not given.
        iterations: turns; both papers take three. After the last one tokens sum to 1 exactly, prototypes nearly.

    Returns:
        ``(T, ..., K)`` float32, without gradient; every token's sum is 1.
    """
    with torch.autocast(logits.device.type, enabled=False):
        scaled = logits.float() / temperature
        highest = scaled.amax(dim=-1)  # (T, ...)
        shares = scaled.sub_(highest[..., None]).exp_()  # of every token by its own highest: none vanishes
        if counted is not None:
            highest = highest.masked_fill(~counted, -torch.inf)
        # What was taken out of each token is put back before the first turn, relative to the highest of all.
        top = max_over_processes(torch.cat([highest, highest.new_full((1, *highest.shape[1:]), -1e38)]).amax(dim=0))
        tokens = (highest - top).exp()  # (T, ...)
        for _ in range(iterations):
            sums = sum_over_processes(torch.einsum("t...k,t...->...k", shares, tokens)).clamp(min=_FLOOR)
            prototypes = sums.mean(dim=-1, keepdim=True) / sums  # (..., K); a common factor has no effect
            tokens = 1 / torch.einsum("t...k,...k->t...", shares, prototypes).clamp(min=_FLOOR)
            every = tokens
            if counted is not None:
                tokens = tokens * counted
        return shares.mul_(prototypes).mul_(every[..., None])

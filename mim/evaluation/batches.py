"""Rows of a feature bank in keyed order."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mim.evaluation.bank import Bank
from mim.randomness import keyed_generator


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Batches of an epoch; the rest of the rows waits for another one."""
    return max(1, rows // batch_size)


def shuffled(
    banks: Sequence[Bank], rows: Tensor, batch_size: int, epoch: int, seed: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features, float32 on the device, and labels of an epoch's batches, all of one size.

    Args:
        banks: one per random crop of the same images; epoch ``e`` takes the ``e``-th, and after the last the first.
        rows: ``(R,)`` which images.
        batch_size: rows per batch; all of them if there are fewer.
        epoch: names the order.
        seed: names the order.
        device: where batches go.
    """
    bank = banks[epoch % len(banks)]
    order = rows[torch.randperm(len(rows), generator=keyed_generator(seed, "head order", epoch))]
    for chosen in torch.split(order, min(batch_size, len(rows)))[: steps_per_epoch(len(rows), batch_size)]:
        yield bank.features[chosen].to(device).float(), bank.labels[chosen].to(device)

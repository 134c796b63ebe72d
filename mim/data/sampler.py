"""The order of the images, as a function of the step."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from mim.randomness import keyed_generator

Key = tuple[int, int]
"""(epoch, index): which image, and in which pass over the data."""


@dataclass(frozen=True)
class Shard:
    """The part of every global batch that one process loads.

    Args:
        rank: of this process.
        world_size: number of processes.
        accumulate: micro-batches per optimizer step.
    """

    rank: int = 0
    world_size: int = 1
    accumulate: int = 1


class StepSampler(Sampler[list[Key]]):
    """Micro-batches from a given optimizer step to the last, in one pass that no epoch boundary interrupts.

    All epochs' permutations form one endless sequence; step ``s`` owns places ``s * batch .. (s + 1) * batch`` of it.
    So every image comes exactly once per epoch whatever the batch size, and the order is the same for any number of
    workers, ranks and micro-batches, and after any resume.

    Args:
        images: number of images.
        batch_size: global batch size; ``shard`` must divide it.
        steps: ``range(first, last)`` of optimizer steps to yield.
        seed: of the permutations.
        shard: this process's part of a global batch.
    """

    def __init__(self, images: int, batch_size: int, steps: range, seed: int, shard: Shard) -> None:
        self.images, self.batch_size, self.steps, self.seed, self.shard = images, batch_size, steps, seed, shard
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def keys(self, step: int) -> list[Key]:
        """The images of the whole global batch of a step."""
        return [self._key(place) for place in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def __iter__(self) -> Iterator[list[Key]]:
        """Yields this process's keys, one list per micro-batch."""
        shard = self.shard
        size = self.batch_size // (shard.world_size * shard.accumulate)
        for step in self.steps:
            for micro_batch in range(shard.accumulate):
                first = step * self.batch_size + (micro_batch * shard.world_size + shard.rank) * size
                yield [self._key(place) for place in range(first, first + size)]

    def _key(self, place: int) -> Key:
        epoch, position = divmod(place, self.images)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.images, generator=keyed_generator(self.seed, "order", epoch))
        return epoch, int(self._order[position])

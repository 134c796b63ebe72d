"""Labelled images for training with labels: keyed augmented crops without end, middles that are scored once each."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from mim.data.augment import Augmented
from mim.data.bad_files import BadFiles
from mim.data.crops import Crops, collate
from mim.data.labelled import Framed, collate_framed
from mim.data.loading import EndlessLoader, WatchedLoader
from mim.data.sampler import Shard, StepSampler
from mim.data.sources import Source


class FinetuneData(L.LightningDataModule):
    """Images to fine-tune on and to be scored on.

    Args:
        train: images to learn from.
        test: images to be scored on; every process takes its own, none twice.
        frames: how they are cut.
        batch_size: global, over all devices and accumulation.
        num_workers: loader processes.
        seed: of order and crops.
        bad_files: counts the unreadable ones.
    """

    def __init__(
        self,
        train: Source,
        test: Source,
        frames: Augmented,
        batch_size: int,
        num_workers: int,
        seed: int,
        bad_files: BadFiles,
    ) -> None:
        super().__init__()
        self.train, self.test, self.frames = train, test, frames
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.bad_files = bad_files
        self.bad_files.total = len(train) + len(test)
        self.first_step = 0

    def train_dataloader(self) -> EndlessLoader:
        """Micro-batches of this process from ``first_step`` to the trainer's last."""
        trainer = self.trainer
        assert trainer is not None
        shard = Shard(trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches)
        steps = range(self.first_step, trainer.max_steps)
        return EndlessLoader(
            Crops(self.train, self.frames, self.seed),
            batch_sampler=StepSampler(len(self.train), self.batch_size, steps, self.seed, shard),
            collate_fn=collate,
            **self._loading(trainer),
        )

    def val_dataloader(self) -> WatchedLoader:
        """This process's part of the scored images; parts may differ in length by one."""
        trainer = self.trainer
        assert trainer is not None
        own = range(trainer.global_rank, len(self.test), trainer.world_size)
        size = max(1, self.batch_size // (trainer.world_size * trainer.accumulate_grad_batches))
        framed = Framed(self.test, self.frames, own)
        return WatchedLoader(framed, batch_size=size, collate_fn=collate_framed, **self._loading(trainer))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401 - Lightning's signature
        """Takes the unreadable files out of a batch and counts them."""
        pixels, labels, *rest = batch
        bad = rest[1] if len(rest) > 1 else rest[0]  # behind the keys of random crops
        self.bad_files.add(*bad)
        return pixels, labels

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401 - Lightning's signature
        """Normalises on the device."""
        pixels, labels = batch
        frames = self.frames.to(labels.device)
        return frames.normalize(pixels) if isinstance(pixels, Tensor) else [
            frames.normalize(view) for view in pixels
        ], labels

    def _loading(self, trainer: L.Trainer) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": trainer.strategy.root_device.type == "cuda" and torch.cuda.is_available(),
        }

"""Images for pretraining: what to read, in which order, cut into which views. Labels serve the online probes only."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, final

import lightning as L
from torch import Tensor

from mim.data.bad_files import BadFiles
from mim.data.builtin import PhotoSource, check_colour
from mim.data.crops import Centers, Crops, collate, collate_readable
from mim.data.images import ImageError
from mim.data.loading import EndlessLoader, WatchedLoader
from mim.data.sampler import Shard, StepSampler
from mim.data.shapes import ShapeSource
from mim.data.sources import Source, open_source
from mim.data.views import IMAGENET_MEAN, IMAGENET_STD, SingleView, Views
from mim.errors import UserError
from mim.randomness import RowGenerator


@final
class PretrainData(L.LightningDataModule):
    """Images to pretrain on.

    Args:
        path: folder (nested or flat), list or CSV file, tar shards ``name-{0000..0099}.tar``, or the built-in sets
            ``builtin`` (real photos) and ``shapes`` (generated).
        views: how images are cropped and augmented.
        batch_size: global batch size, over all devices and accumulation.
        num_workers: loader processes; ``auto`` is one per core, at most 16.
        max_bad: share of unreadable files above which the run stops.
        mean: per channel, on a scale of 0 to 1; ImageNet's for three channels unless given.
        std: as ``mean``.
        licence: of the images, for the model card.
    """

    def __init__(
        self,
        path: str = "builtin",
        views: Views | None = None,
        batch_size: int = 256,
        num_workers: int | Literal["auto"] = "auto",
        max_bad: float = 0.01,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        licence: str = "unknown",
    ) -> None:
        super().__init__()
        workers = 0 if num_workers == "auto" else num_workers
        if not 1 <= batch_size <= 1 << 24 or not 0 <= workers <= 1024 or not 0 <= max_bad <= 1:
            raise ValueError(f"batch_size {batch_size}, num_workers {num_workers} or max_bad {max_bad} cannot be")
        if std and not all(value > 0 for value in std):
            raise ValueError(f"std {std} must be above 0")
        self.path, self.batch_size, self.licence = path, batch_size, licence
        self.views = views or SingleView()
        self.num_workers = min(_cores(), 16) if num_workers == "auto" else num_workers
        self._mean, self._std = mean, std
        self.bad_files = BadFiles(max_bad, path)
        self.first_step = 0

    def open(self, size: tuple[int, int], channels: int, seed: int) -> None:
        """Finds the images; afterwards ``source`` and, if there is a separate one, ``evaluation`` stand ready.

        Args:
            size: height and width of a (global) view: the encoder's input.
            channels: of the encoder's input.
            seed: of order and crops.
        """
        self.source, self.evaluation = _open(self.path, channels)
        self.mean, self.std = self.statistics(channels)
        self.views.configure(size, self.mean, self.std)
        self.seed = seed
        self.bad_files.total = len(self.source)

    def statistics(self, channels: int) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel that images are normalised with."""
        mean = self._mean or (list(IMAGENET_MEAN) if channels == 3 else [0.5] * channels)
        std = self._std or (list(IMAGENET_STD) if channels == 3 else [0.25] * channels)
        if not len(mean) == len(std) == channels:
            raise UserError(f"data.mean {mean} and data.std {std} are not for {channels} channels")
        return mean, std

    def check(self, sample: int = 256) -> tuple[int, tuple[int, int]]:
        """Reads some images spread over the set; returns how many, and the smallest width and height among them."""
        count = min(sample, len(self.source))
        indices = [i * len(self.source) // count for i in range(count)]
        with ThreadPoolExecutor(_cores()) as pool:  # decoding releases the interpreter lock
            sizes = [size for size in pool.map(self._size, indices) if size is not None]
        self.bad_files.stop_if_too_many(seen=count)
        if not sizes:
            raise UserError(f"--data {self.path}: none of the first {count} images can be read")
        return count, (min(w for w, _ in sizes), min(h for _, h in sizes))

    def sampler(self, steps: range, shard: Shard | None = None) -> StepSampler:
        """The order of the images over ``steps``."""
        return StepSampler(len(self.source), self.batch_size, steps, self.seed, shard or Shard())

    def train_dataloader(self) -> EndlessLoader:
        """Micro-batches of this process from ``first_step`` to the trainer's last."""
        trainer = self.trainer
        assert trainer is not None
        shard = Shard(trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches)
        return EndlessLoader(
            Crops(self.source, self.views, self.seed),
            batch_sampler=self.sampler(range(self.first_step, trainer.max_steps), shard),
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def batch(self, step: int) -> tuple[list[Tensor], Tensor, list[str]]:
        """The global batch of a step as the method saw it, and the names of its files: for looking into a failure."""
        crops = Crops(self.source, self.views, self.seed)
        loaded = [crops.load(key) for key in self.sampler(range(0)).keys(step)]
        views, labels, numbers, _ = collate([sample for _, sample in loaded])
        names = [self.source.describe(index) for index, _ in loaded]
        return self.views.cpu()(views, RowGenerator(numbers)), labels, names

    def center_batches(
        self, source: Source, indices: Sequence[int], batch_size: int = 64
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised middles ``(B, C, H, W)`` of the readable ones among ``indices``, and their labels ``(B,)``."""
        loader = WatchedLoader(
            Centers(source, self.views, indices),
            batch_size=batch_size,
            num_workers=self.num_workers,
            collate_fn=collate_readable,
        )
        for images, labels in loader:
            if len(images):
                yield self.views.normalize(images.to(self.views.mean.device)), labels

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401 - Lightning's signature
        """Notes the unreadable files of a batch; wraps the keys, which then stay on the CPU."""
        views, labels, keys, bad = batch
        self.bad_files.add(*bad)
        return views, labels, RowGenerator(keys)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401 - Lightning's signature
        """Finishes the views on the device."""
        views, labels, generator = batch
        return self.views.to(labels.device)(views, generator), labels

    def _size(self, index: int) -> tuple[int, int] | None:
        try:
            _, height, width = self.source.read(index).shape
        except ImageError as error:
            self.bad_files.add((error.path, error.reason))
            return None
        return width, height


def _open(path: str, channels: int) -> tuple[Source, Source | None]:
    if path in ("builtin", "shapes"):
        check_colour(path, channels)
    if path == "builtin":
        return PhotoSource("train"), PhotoSource("test")
    if path == "shapes":
        return ShapeSource("train"), ShapeSource("val")
    return open_source(path, channels)


def _cores() -> int:
    return len(os.sched_getaffinity(0))

"""What loader processes make of images: views for a step, centre crops for probes and pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from mim.data.bad_files import Bad
from mim.data.files import NothingReadableError, UnmeasuredError
from mim.data.images import ImageError
from mim.data.sampler import Key
from mim.data.sources import FileSource, Source
from mim.data.views import Views, stacked
from mim.randomness import derive_seed, keyed_generator

Sample = tuple[list[Tensor], int, int, list[Bad]]
"""Views of the data's type, label (-1 if there is none), key of what is left to draw on the device, bad files."""


class Crops(Dataset[Sample]):
    """Views of an image for a key (epoch, index), the same wherever and whenever they are made.

    Args:
        source: the images.
        views: how to cut them.
        seed: of the crops.
    """

    def __init__(self, source: Source, views: Views, seed: int) -> None:
        self.source, self.views, self.seed = source, views, seed

    def __getitem__(self, key: Key) -> Sample:
        """What is made of a key."""
        return self.load(key)[1]

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        """What is made of the keys of a batch."""
        fetch(self.source, [index for _, index in keys])
        return [self[key] for key in keys]

    def load(self, key: Key) -> tuple[int, Sample]:
        """What is made of a key, after the image that it was made of: a substitute's if the key's own is unreadable."""
        epoch, index = key
        bad: list[Bad] = []
        unmeasured = 0
        substitutes = keyed_generator(self.seed, "substitute", epoch, index)
        while True:
            try:
                image = self.source.read(index)
                break
            except UnmeasuredError as error:
                unmeasured += 1
                if unmeasured > 1000:
                    raise NothingReadableError(f"1,000 windows in a row are nodata, last {error}") from error
                index = int(torch.randint(len(self.source), (1,), generator=substitutes))
            except ImageError as error:
                bad.append((error.path, error.reason))
                if len(bad) > 100:
                    raise NothingReadableError(f"100 images in a row cannot be read, last {error}") from error
                index = int(torch.randint(len(self.source), (1,), generator=substitutes))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator: key it for this image
            torch.default_generator.manual_seed(derive_seed(self.seed, "crop", *key))
            views = self.views.crop(image)
        label = self.source.labels[index] if self.source.labels else -1
        return index, (views, label, derive_seed(self.seed, "augment", *key), bad)


class Centers(Dataset[tuple[Tensor, int] | None]):
    """Middles of images for probes and pictures; ``None`` for an unreadable one.

    Args:
        source: the images.
        views: gives size and statistics.
        indices: which images.
    """

    def __init__(self, source: Source, views: Views, indices: Sequence[int]) -> None:
        self.source, self.views, self.indices = source, views, indices

    def __len__(self) -> int:
        """Number of images asked for."""
        return len(self.indices)

    def __getitems__(self, positions: Sequence[int]) -> list[tuple[Tensor, int] | None]:
        """Those of a batch."""
        fetch(self.source, [self.indices[position] for position in positions])
        return [self[position] for position in positions]

    def __getitem__(self, position: int) -> tuple[Tensor, int] | None:
        """``(C, H, W)`` of the data's type, and label."""
        index = self.indices[position]
        try:
            image = self.source.read(index)
        except ImageError:
            return None
        return self.views.center(image), self.source.labels[index] if self.source.labels else -1


def fetch(source: Source, indices: Sequence[int]) -> None:
    """Makes reading these images next quick, if the source knows how."""
    if isinstance(source, FileSource):
        source.fetch(indices)


def collate(samples: list[Sample]) -> tuple[Any, ...]:
    """Stacks views, labels and keys, joins the lists of bad files.

    Returns:
        Views ``V x (B, C, H, W)``, labels, keys, bad files; and only where pixels are nodata
        ``V x (B, 1, H, W)`` bool, True where they are not.
    """
    views = [stacked(own) for own in zip(*(sample[0] for sample in samples), strict=True)]
    labels, keys = default_collate([sample[1:3] for sample in samples])
    bad = [bad for *_, bads in samples for bad in bads]
    valid = [~view[:, :1].isnan() for view in views if view.is_floating_point()]
    return (views, labels, keys, bad) if all(part.all() for part in valid) else (views, labels, keys, bad, valid)


def collate_readable(samples: list[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor]:
    """Stacks what could be read: ``(B, C, H, W)`` and labels ``(B,)``; both empty if nothing could."""
    readable = [sample for sample in samples if sample is not None]
    if not readable:
        return torch.empty(0), torch.empty(0, dtype=torch.long)
    return stacked([image for image, _ in readable]), torch.tensor([label for _, label in readable])

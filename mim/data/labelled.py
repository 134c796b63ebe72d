"""Labelled images to measure an encoder on: a part to learn from and a part to be scored on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mim.data.bad_files import Bad
from mim.data.builtin import open_built_in
from mim.data.images import ImageError
from mim.data.loading import WatchedLoader
from mim.data.objects import ObjectSource, is_object, open_object
from mim.data.pixels import EIGHT_BIT, Pixels
from mim.data.places import BUILT_IN
from mim.data.sources import FileSource, FolderSource, ListSource, Source, open_source
from mim.data.views import SingleView, stacked
from mim.errors import UserError
from mim.program import called, quoted
from mim.randomness import derive_seed
from mim.terminal import progress

UNREADABLE = -1
"""Label of an image that could not be read: its row keeps its place and is left out of every score."""


@dataclass(frozen=True)
class LabelledImages:
    """What ``--data`` names.

    Args:
        train: to learn from.
        test: to be scored on; absent if the data does not set it apart.
        classes: names by label.
        name: short, for folders and titles.
        notes: what was found out about the layout, for the user.
    """

    train: Source
    test: Source | None
    classes: list[str]
    name: str
    notes: tuple[str, ...] = ()


class Part:
    """Some images of another source, with labels of one's own choice: a split, or the classes that two parts share.

    Args:
        source: where the images are.
        indices: which of them, in this order.
        classes: names by label; images of other classes must not be among ``indices``.
    """

    def __init__(self, source: Source, indices: Sequence[int], classes: Sequence[str]) -> None:
        assert source.labels is not None
        number = {name: label for label, name in enumerate(classes)}
        self.name, self.source, self.indices, self.classes = source.name, source, list(indices), list(classes)
        self.labels: list[int] | None = [number[source.classes[source.labels[index]]] for index in self.indices]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.indices)

    def describe(self, index: int) -> str:
        """The image's path as messages show it."""
        return self.source.describe(self.indices[index])

    def read(self, index: int) -> Tensor:
        """``(C, H, W)`` of the data set's type; raises ``ImageError``."""
        return self.source.read(self.indices[index])


def open_labelled(
    data: str,
    channels: int = 3,
    classes: Literal["same", "common"] = "same",
    label_column: str | None = None,
    pixels: Pixels = EIGHT_BIT,
) -> LabelledImages:
    """Opens class folders, a labelled list, labelled tar shards, or a built-in set.

    Args:
        data: a folder with ``train/`` and ``val/`` or ``test/``, each with a folder per class; one folder of class
            folders, a labelled ``.csv`` or tar shards, which have no test part; ``builtin`` or ``shapes``.
        channels: of the images.
        classes: ``same`` refuses parts whose classes differ, ``common`` scores those that both have.
        label_column: column of a table, or number of a folder's level, that holds the labels.
        pixels: what the files hold, as the encoder has learnt it.

    Raises:
        UserError: if there is nothing to read, labels are missing, or classes differ.
    """
    if data in BUILT_IN:
        learnt, held = open_built_in(data, channels, pixels, label_column)
        return LabelledImages(learnt, held, learnt.classes, data)
    train: FileSource | ObjectSource
    test: FileSource | ObjectSource | None
    if is_object(data):
        train, test = open_object(data, channels)
    else:
        train, test = open_source(data, channels, same_classes=False, label_column=label_column)
    for source in (train, test):
        if source is not None:
            source.pixels = pixels
            if not source.labels:
                raise _no_labels(data, source, train)
    if len(train.classes) < 2 and (test is None or test.classes == train.classes):
        raise _one_class(data, train)
    notes = tuple(train.findings())
    if test is None or train.classes == test.classes:
        return LabelledImages(train, test, train.classes, train.name, notes)
    shared = [name for name in train.classes if name in set(test.classes)]
    if classes == "same" or len(shared) < 2:
        raise _different_classes(data, train, test, shared)
    return LabelledImages(_only(train, shared), _only(test, shared), shared, train.name, notes)


def fingerprint(source: Source) -> list[str]:
    """A line per image that changes when the image does: what it is called, its label, size and time of its file."""
    labels = source.labels or [UNREADABLE] * len(source)
    return [f"{source.describe(index)}\t{label}\t{_stamp(source, index)}" for index, label in enumerate(labels)]


class Frames(SingleView):
    """How a labelled image is cut: its middle to be scored, random crops to learn from.

    Args:
        crop_pct: side of the middle as a share of the resized image's shorter side; 0.875 is 224 of 256 pixels.
        scale: smallest and largest share of the image's area in a random crop.
        flip: probability of a horizontal flip of a random crop.
    """

    def __init__(self, crop_pct: float = 1.0, scale: tuple[float, float] = (0.08, 1.0), flip: float = 0.5) -> None:
        if not 0 < crop_pct <= 1:
            raise UserError(f"--crop_pct {crop_pct} is not a share of the image", hint="--crop_pct 0.875")
        self.crop_pct = crop_pct
        super().__init__(scale=scale, flip=flip)

    def center(self, image: Tensor) -> Tensor:
        """The middle of ``(C, H, W)`` at view size, of its type."""
        return self._middle(image, self.crop_pct)


class Framed(Dataset[tuple[Tensor, int, Bad | None]]):
    """Cut images with labels, each the same wherever and whenever it is made; an unreadable one is black.

    Args:
        source: the images.
        frames: how to cut them.
        indices: which of them.
        crop: (seed, epoch) of a random crop; the middle if not given.
    """

    def __init__(
        self, source: Source, frames: SingleView, indices: Sequence[int], crop: tuple[int, int] | None = None
    ) -> None:
        self.source, self.frames, self.indices, self.crop = source, frames, indices, crop

    def __len__(self) -> int:
        """Number of images asked for."""
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int, Bad | None]:
        """``(C, H, W)`` of the data set's type, label, and why it could not be read."""
        index = self.indices[position]
        try:
            image = self.source.read(index)
        except ImageError as error:
            black = torch.zeros(len(self.frames.mean), *self.frames.size, dtype=torch.uint8)
            return black, UNREADABLE, (error.path, error.reason)
        label = self.source.labels[index] if self.source.labels else UNREADABLE
        if self.crop is None:
            return self.frames.center(image), label, None
        seed, epoch = self.crop
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator: key it for this image
            torch.default_generator.manual_seed(derive_seed(seed, "crop", epoch, index))
            return self.frames.crop(image)[0], label, None


def framed_batches(
    images: Framed, batch_size: int, num_workers: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor, list[Bad]]]:
    """Normalised ``(B, C, H, W)`` on the device, labels ``(B,)``, and what could not be read, in order.

    Args:
        images: which images, cut how.
        batch_size: images in a batch; the last may hold fewer.
        num_workers: loader processes.
        device: where images are normalised and stay.
    """
    frames = images.frames.to(device)
    loader = WatchedLoader(
        images,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_framed,
        pin_memory=torch.device(device).type == "cuda",
    )
    for pixels, labels, bad in progress(loader, len(loader), "encoding", "batch"):
        yield frames.normalize(pixels.to(device, non_blocking=True)), labels, bad


def collate_framed(samples: list[tuple[Tensor, int, Bad | None]]) -> tuple[Tensor, Tensor, list[Bad]]:
    """Stacks images and labels, joins what could not be read."""
    labels = torch.tensor([label for _, label, _ in samples])
    return stacked([pixels for pixels, *_ in samples]), labels, [bad for *_, bad in samples if bad]


def _only(source: Source, classes: Sequence[str]) -> Part:
    kept = {label for label, name in enumerate(source.classes) if name in set(classes)}
    assert source.labels is not None
    return Part(source, [index for index, label in enumerate(source.labels) if label in kept], classes)


def _stamp(source: Source, index: int) -> str:
    """Size and time of an image's file; built-in images and members of tar files have none of their own.

    What comes out of an object of Python may differ at the next call: features of it are never taken from before.
    """
    if isinstance(source, Part):
        return _stamp(source.source, source.indices[index])
    if isinstance(source, ObjectSource):
        return source.token
    if not isinstance(source, FolderSource | ListSource):
        return ""
    try:
        status = source.encoded(index).stat()
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def _one_class(data: str, source: FileSource | ObjectSource) -> UserError:
    return UserError(
        f"--data {data}: every image is of the class {source.classes[0]}",
        why="whatever the features are, every answer would be right",
        hint=f"{called('check_data')} --data {quoted(data)}   shows what was found",
    )


def _no_labels(data: str, source: FileSource | ObjectSource, train: FileSource | ObjectSource) -> UserError:
    if isinstance(source, ObjectSource):
        why = "labels are a list `targets` beside the items, as torchvision's data sets have, or a ClassLabel column"
        return UserError(f"--data {data} has no labels", why=why, hint="set dataset.targets")
    error = f"--data {data}: {source.part or data} has no labels"
    if source.unclear:
        return UserError(error, why=source.unclear.why, hint=source.unclear.hint)
    if train.labels and train.part.endswith("/"):
        why = f"{train.part} has {len(train.classes)} classes; a share of it can be held out and scored instead"
        return UserError(error, why=why, hint=f"--data {quoted(Path(data) / train.part)}")
    if source.tables:
        why = "a list beside the images may know their labels"
        return UserError(error, why=why, hint="   or   ".join(f"--data {quoted(table)}" for table in source.tables[:3]))
    masks = any(kind.startswith("masks") for kind in source.ignored)
    part = source.part if source.part.endswith("/") else ""
    return UserError(
        error,
        why="images must lie in one folder per class, two classes or more, with no image beside them"
        + (f"; masks are for  {called('segment')}" if masks else ""),
        hint=f"{data}/{part}CLASS/IMAGE.jpg   or   --data LIST.csv   with the columns path,label",
    )


def _different_classes(
    data: str, train: FileSource | ObjectSource, test: FileSource | ObjectSource, shared: list[str]
) -> UserError:
    lost = {test.part: set(train.classes) - set(test.classes), train.part: set(test.classes) - set(train.classes)}
    missing = "; ".join(
        f"missing in {where.rstrip('/')}: {', '.join(sorted(names)[:5])}" for where, names in lost.items() if names
    )
    hint = f"--classes common   scores the {len(shared)} shared ones; or add the folders"
    if len(shared) < 2:
        hint = "the same folder names in both parts"
    return UserError(
        f"--data {data}: {train.part} has {len(train.classes)} classes, {test.part} has {len(test.classes)}  "
        f"({missing})",
        hint=hint,
    )

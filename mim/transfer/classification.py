"""Labelled images beside the weights that are measured: what ``knn``, ``linear_probe`` and ``finetune`` share."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mim.data.bad_files import BadFiles
from mim.data.labelled import Framed, Frames, LabelledImages, Part, fingerprint, framed_batches, open_labelled
from mim.data.pixels import EIGHT_BIT
from mim.data.pretrain import check_numbers
from mim.data.sources import Source
from mim.encoder import Encoder
from mim.errors import UserError
from mim.evaluation.balance import images_per_class, uneven
from mim.evaluation.bank import Bank, cached_bank
from mim.evaluation.features import Features
from mim.evaluation.splits import stratified_split
from mim.options.classification import ClassificationOptions
from mim.randomness import derive_seed
from mim.reduction import Labels
from mim.transfer.measurement import UNTRAINED, Measurement


class Classification(Measurement):
    """An encoder and labelled images, opened.

    Args:
        options: what was asked for.
        learning: a token reduction may have weights of its own, since they are going to be trained.

    Attributes:
        train: images to learn from.
        test: images to be scored on.
        classes: names by label.
        frames: how images are cut and normalised.
        split: where the scored images come from, in words.
    """

    options: ClassificationOptions

    def __init__(self, options: ClassificationOptions, learning: bool = False) -> None:
        super().__init__(options, img_size=options.img_size)
        encoder = self.loaded.encoder
        self.frames = Frames(options.crop_pct)
        self.frames.configure(encoder.img_size, self.loaded.mean, self.loaded.std, self.loaded.pixels)
        column = None if options.label_column is None else str(options.label_column)
        images = open_labelled(options.data, encoder.in_chans, options.classes, column, self.loaded.pixels)
        note = check_numbers(options.data, images.train, encoder.in_chans, self.loaded.pixels)
        self.train, self.test, self.split = _parts(images, options.val_fraction)
        self.classes = images.classes
        self.labels = Labels(len(self.classes)) if learning else None
        self.reduce(encoder)
        notes = [*images.notes, *([note] if note else [])]
        self.introduce("\n          ".join([f"{len(self.classes)} classes, {self.split}", *notes]))

    @property
    def uneven(self) -> bool:
        """Whether the classes of the scored images differ in size so that top-1 alone misleads."""
        return uneven(images_per_class(self.test.labels or [], self.classes))

    def class_sizes(self, right: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        """What ``metrics.json`` says about classes that are uneven: how many images each has, and how many are right.

        Args:
            right: right answers of the pretrained encoder by class, by the name of what answered.
        """
        if not self.uneven:
            return {}
        parts = {"learnt": self.train, "scored": self.test}
        return {
            f"images {part} per class": images_per_class(source.labels or [], self.classes)
            for part, source in parts.items()
        } | {f"images right per class, {what}": dict(counts) for what, counts in right.items()}

    def reduce(self, encoder: Encoder, seed: int = 0) -> Encoder:
        """The same encoder with its reduction, on the device; ``seed`` draws what that is going to learn."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "reduction"))
            return super().reduce(encoder).to(self.device)

    def untrained(self, seed: int) -> Encoder:
        """The same encoder before training, as ``seed`` draws it, on the device."""
        return self.reduce(self.fresh(UNTRAINED, seed))

    def banks(self, encoder: Encoder, features: Features, crops: int = 0) -> tuple[list[Bank], Bank]:
        """Features to learn from, one bank per random crop or one of centre crops, and those to be scored on.

        All processes call it together.
        """
        try:
            learnt = [self._bank(encoder, features, self.train, (0, number)) for number in range(crops)]
            learnt = learnt or [self._bank(encoder, features, self.train)]
            return learnt, self._bank(encoder, features, self.test)
        except ValueError as error:
            raise UserError(f"--weights {self.options.weights}: {error}", hint="--pool mean --layers 1") from error

    def protocol(self) -> str:
        """How images are shown to the encoder and which are scored, in words."""
        size = "x".join(map(str, dict.fromkeys(self.frames.size)))
        return f"{size} px, centre crop {self.options.crop_pct:g}; {self.split}{self.reduced_in_words()}"

    def _bank(self, encoder: Encoder, features: Features, source: Source, crop: tuple[int, int] | None = None) -> Bank:
        options = self.options
        bad = BadFiles(options.max_bad, options.data)
        bad.total = len(source)

        def batches(rows: range) -> Iterator[tuple[Tensor, Tensor]]:
            framed = Framed(source, self.frames, rows, crop)
            for images, labels, unreadable in framed_batches(framed, options.encode_batch, self.workers, self.device):
                bad.add(*unreadable)
                bad.stop_if_too_many()
                yield images, labels

        facts: dict[str, Any] = {"images": fingerprint(source), "size": self.frames.size, "crop": crop}
        facts |= {"crop_pct": options.crop_pct, "mean": self.loaded.mean, "std": self.loaded.std}
        if self.loaded.pixels != EIGHT_BIT:
            facts["pixels"] = self.loaded.pixels.facts()
        if encoder.reduction is not None:
            facts["reduction"] = encoder.reduction.describe()

        def name(rows: list[int]) -> None:
            bad.add(*((source.describe(row), "unreadable when its features were computed") for row in rows))
            bad.stop_if_too_many()

        return cached_bank(options.cache, encoder, features, len(source), facts, batches, name, options.data)


def _parts(images: LabelledImages, val_fraction: float) -> tuple[Source, Source, str]:
    """Images to learn from, images to score, and where the latter come from."""
    if images.test is not None:
        counts = f"learnt from {len(images.train):,} images, scored on {len(images.test):,} that the data sets apart"
        return images.train, images.test, counts
    if not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction {val_fraction} is not a share of the images", hint="--val_fraction 0.2")
    labels = torch.tensor(images.train.labels)
    try:
        kept, held = stratified_split(labels, val_fraction, "held-out images")
    except ValueError as error:
        raise UserError(f"--data {images.name}: {error}", hint="two images per class or more") from error
    train, test = (Part(images.train, rows.tolist(), images.classes) for rows in (kept, held))
    return train, test, f"learnt from {len(train):,} images, scored on {len(test):,} held out by a key"

"""Images for pretraining: what to read, in which order, cut into which views. Labels serve the online probes only."""

import os
import shlex
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, final

import lightning as L
import torch
from torch import Tensor

from mim.data.bad_files import BadFiles, BadFileWarning, refuse_channels
from mim.data.builtin import PhotoSource, open_built_in
from mim.data.crops import Centers, Crops, collate, collate_readable
from mim.data.files import UnmeasuredError
from mim.data.images import ImageError, read_image
from mim.data.loading import EndlessLoader, WatchedLoader
from mim.data.measuring import Measured, measure, option, spread
from mim.data.objects import ObjectSource, is_object, open_object, short_name
from mim.data.pixels import EIGHT_BIT, Pixels, PixelType, parse_bands, parse_range
from mim.data.places import BUILT_IN
from mim.data.sampler import Shard, StepSampler
from mim.data.shapes import ShapeSource
from mim.data.sources import FileSource, Source, open_source
from mim.data.views import IMAGENET_MEAN, IMAGENET_STD, SingleView, Views
from mim.data.windows import Windows, WindowSource, cut
from mim.errors import UserError
from mim.options.ranges import Count, Processes, Share, Side
from mim.program import called
from mim.randomness import RowGenerator


@final
class PretrainData(L.LightningDataModule):
    """Images to pretrain on.

    Args:
        path: folder (nested or flat), list or CSV file, tar shards ``name-{0000..0099}.tar``, here or behind ``s3://``,
            ``https://`` or ``hf://``, or the built-in sets ``builtin`` (real photos) and ``shapes`` (generated).
        views: how images are cropped and augmented.
        batch_size: global batch size, over all devices and accumulation.
        num_workers: loader processes; ``auto`` is one per core, at most 16.
        max_bad: share of unreadable files above which the run stops.
        mean: per channel, on the scale of 0 to 1; ImageNet's for 8-bit RGB, else measured unless given.
        std: as ``mean``.
        licence: of the images, for the model card.
        label_column: column of a table, by name or number, or number of a folder's level, that holds the labels of the
            probes; found out unless given.
        value_range: numbers in the files that become 0 and 1, as 0,4095 or one pair per channel; auto measures them
            once for all files, per_file scales every file to 8 bit by itself, as earlier versions did.
        pixel_type: of the files: uint8, uint16, int16, float32, or any; found with the range unless given.
        clip: keep values within 0 and 1.
        log_values: scale the logarithm of the numbers, between those of the two ends of the range; what lies below the
            lower end counts as that end, negative numbers are refused.
        bands: channels to read of each file, counted from 1, as 4,3,2; all unless given.
        nodata: number that stands for "not measured", besides NaN and what a GeoTIFF names.
        windows: side in pixels of the windows that larger images are cut into, each an image of its own; images are
            read whole unless given.
        stride: pixels from one window to the next; as many as a window has unless given.
    """

    def __init__(
        self,
        path: str = "builtin",
        views: Views | None = None,
        batch_size: Count = 256,
        num_workers: Processes | Literal["auto"] = "auto",
        max_bad: Share = 0.01,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        licence: str = "unknown",
        label_column: int | str | None = None,
        value_range: list[list[float]] | list[float] | str = "auto",
        pixel_type: Literal["uint8", "uint16", "int16", "float32", "any"] | None = None,
        clip: bool = False,
        bands: list[int] | int | str | None = None,
        nodata: float | None = None,
        windows: Side | None = None,
        stride: Count | None = None,
        log_values: bool = False,
    ) -> None:
        super().__init__()
        workers = 0 if num_workers == "auto" else num_workers
        if not 1 <= batch_size <= 1 << 24 or not 0 <= workers <= 1024 or not 0 <= max_bad <= 1:
            raise ValueError(f"batch_size {batch_size}, num_workers {num_workers} or max_bad {max_bad} cannot be")
        if std and not all(value > 0 for value in std):
            raise ValueError(f"std {std} must be above 0")
        self.path, self.batch_size, self.licence = path, batch_size, licence
        self.label_column = None if label_column is None else str(label_column)
        self.views = views or SingleView()
        self.num_workers = min(_cores(), 16) if num_workers == "auto" else num_workers
        self._mean, self._std = mean, std
        self.pixels, self.resolved = _given(value_range, pixel_type, clip, parse_bands(bands), nodata, log_values)
        self._found = value_range == "auto"
        self.measured: Measured | None = None
        self.channels = 3
        self.windows = Windows.of(windows, stride)
        self.bad_files = BadFiles(max_bad, path, reading=f" --windows {windows}" if windows else "")
        self.first_step = 0

    def open(self, size: tuple[int, int], channels: int, seed: int) -> None:
        """Finds the images; afterwards ``source`` and, if there is a separate one, ``evaluation`` stand ready.

        Args:
            size: height and width of a (global) view: the encoder's input.
            channels: of the encoder's input.
            seed: of order and crops.
        """
        if self.pixels.bands and len(self.pixels.bands) != channels:
            raise UserError(
                f"--bands names {len(self.pixels.bands)} channels, the model takes {channels}",
                hint=f"--in_chans {len(self.pixels.bands)}",
            )
        self.source, self.evaluation = _open(self.path, channels, self.label_column, self.pixels)
        if self.windows:
            self.source = self._cut(self.source, self.windows)
            self.evaluation = self.evaluation and self._cut(self.evaluation, self.windows)
        self.channels, self.seed = channels, seed
        self.views.configure(size, IMAGENET_MEAN, IMAGENET_STD, EIGHT_BIT)
        if isinstance(self.source, PhotoSource | ShapeSource):
            self.pixels, self.resolved = EIGHT_BIT, True
        self._use(self.pixels, *self.statistics(channels))
        self.bad_files.total = len(self.source)

    def _cut(self, source: Source, windows: Windows) -> WindowSource:
        """The windows of a source; refuses it if too many of its images cannot be cut."""
        found = cut(source, self.path, windows, self.pixels)
        images = BadFiles(self.bad_files.limit, self.path, reading=self.bad_files.reading)
        images.reasons = _reasons(found)
        images.stop_if_too_many(seen=len(source))
        return found

    def normalise_by(self, mean: list[float], std: list[float]) -> None:
        """Takes the statistics of a model instead of ImageNet's; before :meth:`open`."""
        self._mean, self._std = mean, std

    @property
    def short_name(self) -> str:
        """For the run's folder."""
        if is_object(self.path):
            return short_name(self.path)
        return Path(self.path).name.split(".")[0] or "data"

    def statistics(self, channels: int) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel that images are normalised with."""
        mean = self._mean or (list(IMAGENET_MEAN) if channels == 3 else [0.5] * channels)
        std = self._std or (list(IMAGENET_STD) if channels == 3 else [0.25] * channels)
        if not len(mean) == len(std) == channels:
            raise UserError(f"data.mean {mean} and data.std {std} are not for {channels} channels")
        return mean, std

    def check(self, sample: int = 256, first: bool = True) -> tuple[int, tuple[int, int]]:
        """Reads some images spread over the set, and settles what their numbers mean if nothing has said so.

        Args:
            sample: images to read.
            first: whether this process is the one that measures; others are told in :meth:`setup`.

        Returns:
            How many were read, and the smallest width and height among them.

        Raises:
            UserError: if too many cannot be read, or all have another number of channels than the model.
        """
        count = min(sample, len(self.source))
        indices = [i * len(self.source) // count for i in range(count)]
        looks, errors = self._look_at(indices)
        if looks and not self.resolved:
            self._resolve(Counter(look.kind for look in looks), first)
            if errors and self.pixels.type == "uint8":  # which takes what cannot be kept as it is
                more, errors = self._look_at([indices[place] for place in errors])
                looks += more
            elif self.pixels.type not in ("uint8", "any") and len({look.kind for look in looks}) > 1:
                looks, errors = self._look_at(indices)  # files of another type cannot be read any more
        self._note_unmeasured(errors, count)
        refuse_channels(self.path, list(errors.values()), self.channels, count, bands=self.pixels.bands)
        self.bad_files.add(*((error.path, error.reason) for error in errors.values()))
        self.bad_files.stop_if_too_many(seen=count)
        for source in filter(None, (self.source, self.evaluation)):
            if isinstance(source, WindowSource):
                self.bad_files.add(*_reasons(source).items())
        if not looks:
            raise UserError(f"--data {self.path}: none of the first {count} images can be read")
        if self.pixels.type == "per_file":
            self._warn_of_old_scale(indices)
        return count, (min(look.width for look in looks), min(look.height for look in looks))

    def _note_unmeasured(self, errors: dict[int, ImageError], count: int) -> None:
        """Takes windows without measurement out of ``errors``, and tells how many there are."""
        unmeasured = [place for place, error in errors.items() if isinstance(error, UnmeasuredError)]
        for place in unmeasured:
            del errors[place]
        if unmeasured and isinstance(self.source, WindowSource):
            share = len(unmeasured) / count
            self.source.notes.append(f"{share:.0%} of the windows are nodata: others are taken in their place")

    def setup(self, stage: str) -> None:
        """All processes use the numbers of the first."""
        if self.trainer is not None and self.trainer.world_size > 1:
            facts = self.trainer.strategy.broadcast((self.pixels.facts(), self.mean, self.std))
            self._use(Pixels.of(facts[0]), *facts[1:])

    def settings(self) -> dict[str, Any]:
        """What was found out, under the names of the options that say it again."""
        if self.pixels.type == "per_file":
            return {"value_range": "per_file"}
        pairs = [list(pair) for pair in zip(self.pixels.low, self.pixels.high, strict=True)]
        found = {"value_range": pairs[0] if len(pairs) == 1 else pairs, "pixel_type": self.pixels.type}
        return found | {"mean": list(self.mean), "std": list(self.std)}

    @property
    def plain(self) -> bool:
        """Whether images are what everybody expects: 8-bit RGB."""
        return self.pixels == EIGHT_BIT and self.channels == 3

    def describe_values(self) -> str:
        """The scale of the data in words."""
        if self.pixels.type == "per_file":
            return "every file scaled to 8 bit by itself, as in earlier versions"
        if self.measured is not None:
            return self.measured.line()
        scale = f"{option(self.pixels).removesuffix(' --log_values')} in {self.pixels.type} become 0 and 1"
        scale += ", logarithms between" if self.pixels.log else ""
        return f"{scale}; mean {spread(self.mean)} std {spread(self.std)}"

    def _use(self, pixels: Pixels, mean: list[float], std: list[float]) -> None:
        """Reads, cuts and normalises by these numbers from now on."""
        self.pixels, self.mean, self.std = pixels, mean, std
        for source in filter(None, (self.source, self.evaluation)):
            if isinstance(source, FileSource | ObjectSource):
                source.pixels = pixels
        self.views.configure(self.views.size, mean, std, pixels)

    def _resolve(self, kinds: "Counter[str]", first: bool) -> None:
        """Settles the type, and lets the first process measure what is not known without."""
        (kind, count), total = kinds.most_common(1)[0], kinds.total()
        kind = "any" if not self._found and len(kinds) > 1 else kind
        pixels = replace(self.pixels, type=cast(PixelType, kind) if self.pixels.type == "any" else self.pixels.type)
        if kind != "any" and count < total:
            self._warn_of_types(kinds, kind)
        given = not pixels.log and (self.pixels.low, self.pixels.high) == ((0.0,), (255.0,))
        if pixels.type == "uint8" and self.channels == 3 and pixels.colours and given:
            self._use(pixels, *self.statistics(3))
        elif first:
            self._measure(pixels)
        else:
            self._use(pixels, self.mean, self.std)  # until the first process tells
        self.resolved = True

    def _measure(self, pixels: Pixels) -> None:
        self._use(pixels, self.mean, self.std)
        try:
            found = measure(self.source, self.channels, pixels, self.seed, self._found)
        except ValueError as error:
            looked = f"{called('check_data')} --data {shlex.quote(self.path)}"
            hint = "leave --log_values out" if pixels.log else looked
            raise UserError(f"--data {self.path}: {error}", hint=hint) from error
        self.measured = found
        self._use(found.pixels, self._mean or found.mean, self._std or found.std)

    def _warn_of_types(self, kinds: "Counter[str]", kind: str) -> None:
        counts = ", ".join(f"{number} {name}" for name, number in kinds.most_common())
        what = "scaled to it one by one" if kind == "uint8" else "skipped"
        warnings.warn(
            f"--data {self.path} holds several types ({counts}); what is not {kind} is {what}; "
            "--value_range LOW,HIGH takes all numbers as they are",
            MixedTypesWarning,
            stacklevel=3,
        )

    def _warn_of_old_scale(self, indices: Sequence[int]) -> None:
        """Once, and only if it matters: 8-bit colours are the same on both scales."""
        kinds = {_kind_as_stored(self.source, index, self.channels) for index in indices[:8]} - {None}
        if self.channels != 3 or kinds != {"uint8"}:
            warnings.warn(
                "every file is scaled to 8 bit by itself, as when this run's settings were written; "
                "a new run with --value_range auto keeps the numbers that the files hold",
                OldScaleWarning,
                stacklevel=2,
            )

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

    def batch(self, step: int) -> tuple[list[Tensor], Tensor, list[str], list[list[Tensor]]]:
        """The global batch of a step as the method saw it: for looking into a failure.

        Returns:
            Views, labels, names of the files, and what else the batch holds: which pixels were measured, if not all.
        """
        crops = Crops(self.source, self.views, self.seed)
        loaded = [crops.load(key) for key in self.sampler(range(0)).keys(step)]
        views, labels, numbers, _, *valid = collate([sample for _, sample in loaded])
        names = [self.source.describe(index) for index, _ in loaded]
        return self.views.cpu()(views, RowGenerator(numbers)), labels, names, valid

    def augmented(self, count: int) -> tuple[Tensor, list[Tensor]]:
        """Middles ``(B, C, H, W)`` of the run's first images, and the views ``V x (B, C, H_v, W_v)`` made of them."""
        crops = Crops(self.source, self.views, self.seed)
        loaded = [crops.load(key) for key in list(self.sampler(range(0)).keys(0))[:count]]
        views, _, numbers, *_ = collate([sample for _, sample in loaded])
        middles = torch.cat([images for images, _ in self.center_batches(self.source, [index for index, _ in loaded])])
        device = self.views.mean.device
        return middles, self.views([view.to(device) for view in views], RowGenerator(numbers))

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
        views, labels, keys, bad, *valid = batch
        self.bad_files.add(*bad)
        return views, labels, RowGenerator(keys), *valid

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401 - Lightning's signature
        """Finishes the views on the device."""
        views, labels, generator, *valid = batch
        return self.views.to(labels.device)(views, generator), labels, *valid

    def _look_at(self, indices: Sequence[int]) -> tuple[list["Look"], dict[int, ImageError]]:
        """What readable images are like, and why others are not, by their place among ``indices``."""
        with ThreadPoolExecutor(_cores()) as pool:  # decoding releases the interpreter lock
            found = list(pool.map(self._look, indices))
        errors = {place: look for place, look in enumerate(found) if isinstance(look, ImageError)}
        return [look for look in found if isinstance(look, Look)], errors

    def _look(self, index: int) -> "Look | ImageError":
        try:
            image = self.source.read(index)
            kind = str(image.dtype).removeprefix("torch.")
            if isinstance(self.source, FileSource):
                kind = self.source.kind(index, image)
        except ImageError as error:
            return error
        return Look(kind, image.shape[2], image.shape[1])


def _reasons(source: WindowSource) -> dict[str, str]:
    """Why images cannot be cut, by their names."""
    return {error.path: error.reason for error in source.damaged}


class Look(NamedTuple):
    """Type of an image's numbers, and its size."""

    kind: str
    width: int
    height: int


class MixedTypesWarning(BadFileWarning):
    """Files hold numbers of several types."""


class OldScaleWarning(BadFileWarning):
    """A run goes on with the scale of an earlier version."""


def _given(
    value_range: object,
    pixel_type: PixelType | None,
    clip: bool,
    bands: tuple[int, ...],
    nodata: float | None,
    log: bool,
) -> tuple[Pixels, bool]:
    """What options say about pixels, and whether that is all there is to know."""
    ends, known = parse_range(value_range, log), {"clip": clip, "bands": bands, "nodata": nodata, "log": log}
    if value_range == "per_file":
        return Pixels(type="per_file"), True
    if ends is None:
        low = (1.0,) if log else (0.0,)  # until it is measured
        return Pixels(low, type=pixel_type or "any", **known), False  # type: ignore[arg-type]  # by their names
    return Pixels(*ends, type=pixel_type or "any", **known), pixel_type is not None  # type: ignore[arg-type]


def check_numbers(data: str, source: Source, channels: int, pixels: Pixels, sample: int = 8) -> str | None:
    """Looks at some images that a trained encoder is to see.

    Returns:
        What to tell if the encoder knows 8 bit and the files hold more; None if they fit.

    Raises:
        UserError: if all have another number of channels.
    """
    indices = sorted({i * len(source) // sample for i in range(sample)})
    errors = []
    for index in indices:
        try:
            source.read(index)
        except ImageError as error:
            errors.append(error)
    refuse_channels(data, errors, channels, len(indices), option=None, bands=pixels.bands)
    kinds = {_kind_as_stored(source, index, channels) for index in indices if pixels.eight_bit} - {None, "uint8"}
    if not kinds:
        return None
    names = ", ".join(sorted(filter(None, kinds)))
    return f"files hold {names}; the weights know 8 bit, so each file is scaled to it by itself"


def _kind_as_stored(source: Source, index: int, channels: int) -> str | None:
    """Type of an image's numbers in its file; None if it cannot be read or is in no file."""
    if not isinstance(source, FileSource) or isinstance(source, WindowSource):
        return None
    try:
        return str(read_image(source.encoded(index), channels).dtype).removeprefix("torch.")
    except ImageError:
        return None


def _open(path: str, channels: int, label_column: str | None, pixels: Pixels) -> tuple[Source, Source | None]:
    if path in BUILT_IN:
        return open_built_in(path, channels, pixels, label_column)
    if is_object(path):
        return open_object(path, channels)
    return open_source(path, channels, label_column=label_column)


def _cores() -> int:
    return len(os.sched_getaffinity(0))

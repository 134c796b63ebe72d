"""Images and masks for semantic segmentation: cut and augmented together for training, whole for scoring.

Training as in mmsegmentation's ADE20K recipe: the shorter side is scaled to the crop times 0.5 to 2, a crop is drawn
anew (up to ten times) while one class fills more than three quarters of it, then flip and photometric distortion.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, final

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from mim.data.loading import EndlessLoader, WatchedLoader
from mim.data.mask_classes import IGNORE, ClassNumbers, count_classes, refuse_absent, refuse_smoothed
from mim.data.masks import MaskedImages, PairedFiles, PairSource, open_masks
from mim.data.pixels import EIGHT_BIT, Pixels
from mim.data.sampler import Key, Shard, StepSampler
from mim.data.views import Views, resized, stacked
from mim.errors import UserError
from mim.randomness import derive_seed
from mim.terminal import progress

CHECKED = 256
"""Masks of each part that are looked at before anything is trained; all others are checked as they are read."""


class Scored(NamedTuple):
    """One image to be scored.

    Args:
        image: ``(1, C, H, W)`` of the files' type, resized so that its shorter side is the crop's.
        classes: ``(1, H', W')`` int16 in the mask's own size.
    """

    image: Tensor
    classes: Tensor


class JointCrop:
    """A random crop of an image and its classes, the same for both.

    Args:
        size: side of the crop in pixels.
        scale: smallest and largest shorter side of the image, as a multiple of ``size``.
        largest_class: share of a crop above which one class makes it be drawn again.
        fill: number per channel beyond the border of a small image, and where nothing was measured.
        colours: whether three channels are colours, which are then changed.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float],
        largest_class: float = 0.75,
        fill: Sequence[float] = (0, 0, 0),
        colours: bool = True,
    ) -> None:
        self.size, self.scale, self.largest_class, self.fill = size, scale, largest_class, list(fill)
        changes = ({"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.05})
        photometric = (
            [v2.RandomApply([v2.ColorJitter(**change)]) for change in changes] if len(fill) == 3 and colours else []
        )
        self.finish = v2.Compose([v2.RandomHorizontalFlip(), *photometric])

    def __call__(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """``(C, S, S)`` of the image's type and ``(S, S)`` int16; draws from torch's global generator."""
        low, high = self.scale
        side = self.size * (low + (high - low) * float(torch.rand(())))
        pair = _resized(image, side, self.fill), _resized_classes(classes, _shape(image, side))
        window = self._window(pair[1])
        cut = self.finish(*(v2.functional.crop(part, *window) for part in pair))
        room = [0, 0, self.size - window[3], self.size - window[2]]  # at the right and below
        image = _padded(cut[0].as_subclass(Tensor), room, self.fill)
        return image, v2.functional.pad(cut[1], room, fill=IGNORE).as_subclass(Tensor)[0]

    def _window(self, classes: Tensor) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop that no class fills, if ten attempts find one."""
        rows, columns = classes.shape[1:]
        height, width = min(self.size, rows), min(self.size, columns)
        for _ in range(10):
            top, left = (int(torch.randint(room + 1, ())) for room in (rows - height, columns - width))
            found, counts = torch.unique(classes[:, top : top + height, left : left + width], return_counts=True)
            counts = counts[found != IGNORE]
            if len(counts) > 1 and counts.max() < self.largest_class * counts.sum():
                break
        return top, left, height, width


@final
class SegmentationData(L.LightningDataModule):
    """Images to learn segmentation from, and images to be scored.

    Args:
        path: see :func:`mim.data.masks.open_masks`.
        crop: side of a training crop in pixels, and shorter side of a scored image.
        batch_size: crops per step over all devices.
        scale: shorter side of a training image before it is cropped, as a multiple of ``crop``.
        num_classes: scored classes; as many as are named or, failing that, found in the masks unless given.
        ignore: numbers in the masks of pixels that are not scored.
        reduce_zero_label: whether 0 is not scored and classes begin at 1; only in ADE20K's layout unless given.
        classes: file that names the classes.
        split: part that is scored.
        num_workers: loader processes.
        seed: of order and crops.
        values: number of each class in the masks; 0, 1, 2 and so on unless given.
        val_fraction: share that is held out if the data sets nothing apart.
    """

    def __init__(
        self,
        path: str,
        crop: int,
        batch_size: int = 16,
        scale: tuple[float, float] = (0.5, 2.0),
        num_classes: int | None = None,
        ignore: Sequence[int] = (255,),
        reduce_zero_label: bool | None = None,
        classes: Path | None = None,
        split: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        values: tuple[int, ...] | None = None,
        val_fraction: float = 0.2,
    ) -> None:
        super().__init__()
        self.path, self.crop, self.batch_size, self.scale = path, crop, batch_size, scale
        self.given_classes, self.ignore, self.zero_is_other = num_classes, tuple(ignore), reduce_zero_label
        self.file, self.split, self.num_workers, self.seed = classes, split, num_workers, seed
        self.values, self.val_fraction = values, val_fraction
        self.first_step = 0

    def open(self, mean: Sequence[float], std: Sequence[float], pixels: Pixels = EIGHT_BIT) -> None:
        """Finds the images, looks at masks and settles the classes; ``train``, ``test`` and ``names`` stand ready.

        Args:
            mean: per channel, on the scale of ``pixels``, for the normalisation.
            std: as ``mean``.
            pixels: scale of the numbers in the images.
        """
        found = open_masks(self.path, len(mean), self.split, self.file, self.val_fraction, pixels)
        self.train, self.test, self.split = found.train, found.test, found.split
        looked = [self._look(source) for source in (self.train, self.test)]
        self.numbers, self.names = self._classes(found)
        for source, seen in zip((self.train, self.test), looked, strict=True):
            for index, numbers in seen.items():
                self.numbers.check(numbers, source.describe(index))
        self._refuse_absent(set[int]().union(*(numbers for seen in looked for numbers in seen.values())))
        self.notes = [*found.notes, *self._turned(looked[0])]
        self.statistics = torch.tensor([list(mean), list(std)])[:, None, :, None, None]  # (2, 1, C, 1, 1)
        self.frames = Views()
        self.frames.configure((self.crop, self.crop), mean, std, pixels)
        self.crops = JointCrop(self.crop, self.scale, fill=self.frames.filling, colours=pixels.colours)

    def _look(self, source: PairSource) -> dict[int, set[int]]:
        """The numbers in masks spread over a part, which are read with their images and must not be smoothed."""
        count = min(CHECKED, len(source))
        indices = [i * len(source) // count for i in range(count)]

        def look(index: int) -> set[int]:
            _, mask = source.read_pair(index)
            refuse_smoothed(mask, self.ignore, source.describe(index))
            return set(torch.unique(mask).tolist())

        with ThreadPoolExecutor() as pool:
            return dict(zip(indices, pool.map(look, indices), strict=True))

    def _classes(self, found: MaskedImages) -> tuple[ClassNumbers, list[str]]:
        """What the numbers mean, as given, as named or, failing that, as all masks to learn from hold them."""
        first = found.zero_is_other if self.zero_is_other is None else self.zero_is_other
        values = self.values or (None if self.given_classes else found.values)
        ignore = tuple(dict.fromkeys((*self.ignore, *found.ignore)))
        count = len(values) if values else self.given_classes
        if count is None:
            count = max((number for number in found.names if number not in self.ignore), default=-1) + 1 - first
        if count < 1:
            count = count_classes(self._numbers(self.train), self.ignore, first, self.path)
        numbers = ClassNumbers(count, ignore, first, values)
        in_order = bool(values) and not set(values or ()) <= set(found.names) and len(found.names) == count
        keys = sorted(found.names) if in_order else numbers.scored
        return numbers, [found.names.get(key, f"class {key}") for key in keys]

    def _refuse_absent(self, seen: set[int]) -> None:
        """Refuses classes that occur nowhere; all masks are read only if some were not among those looked at."""
        for source in (self.train, self.test):
            if set(self.numbers.scored) <= seen:
                return
            seen |= self._numbers(source)
        refuse_absent(self.numbers, seen, self.names, self.path, len(self.train) + len(self.test))

    def _numbers(self, source: PairSource) -> set[int]:
        """Every number in every mask of a part."""
        indices = range(len(source))
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda index: set(torch.unique(source.read_mask(index)).tolist()), indices)
            bar = progress(found, len(indices), "counting classes", "mask")
            return set().union(*bar)

    def _turned(self, indices: Iterable[int]) -> list[str]:
        """A warning if photos are stored turned and nothing shows that their masks are not."""
        source = self.train
        if not isinstance(source, PairedFiles):
            return []
        turned = [index for index in indices if source.turned(index)]
        if not turned:
            return []
        return [
            f"warning: {len(turned):,} photos are stored turned (EXIF), such as {source.pairs[turned[0]][0]}; masks "
            "are taken as drawn on the photo as it is shown: look at an overlay"
        ]

    def pair(self, source: PairSource, index: int) -> tuple[Tensor, Tensor]:
        """Image ``(C, H, W)`` and classes ``(H, W)`` int16; raises a :class:`UserError` if they are wrong."""
        image, mask = source.read_pair(index)
        return image, self.numbers(mask, source.describe(index))

    def scored(self, source: PairSource, index: int) -> Scored:
        """An image as it is scored."""
        image, classes = self.pair(source, index)
        return Scored(_resized(image, self.crop, self.crops.fill).as_subclass(Tensor)[None], classes[None])

    def middle(self, source: PairSource, index: int) -> tuple[Tensor, Tensor]:
        """The middle of an image ``(C, S, S)`` and its classes ``(S, S)``, as k-NN learns from them."""
        image, classes = self.pair(source, index)
        small = _resized_classes(classes, _shape(image, self.crop))
        cut = [
            v2.functional.center_crop(part, [self.crop] * 2)
            for part in (_resized(image, self.crop, self.crops.fill), small)
        ]
        return cut[0].as_subclass(Tensor), cut[1].as_subclass(Tensor)[0]

    def train_dataloader(self) -> EndlessLoader:
        """Crops of this process from ``first_step`` to the trainer's last."""
        trainer = self.trainer
        assert trainer is not None
        shard = Shard(trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches)
        steps = range(self.first_step, trainer.max_steps)
        order = StepSampler(len(self.train), self.batch_size, steps, self.seed, shard)
        return EndlessLoader(_Crops(self), batch_sampler=order, collate_fn=_stack, num_workers=self.num_workers)

    def val_dataloader(self) -> WatchedLoader:
        """Every scored image once, over all processes: none is repeated to make the shares equal."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        share = range(rank, len(self.test), world)
        return WatchedLoader(_Whole(self), sampler=share, batch_size=None, num_workers=self.num_workers)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401 - Lightning's signature
        """A mistake that a loader process has found ends the run here, in the user's words."""
        if isinstance(batch, UserError):
            raise batch
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401 - Lightning's signature
        """Normalises on the device."""
        images, classes = batch
        return self.normalize(images), classes

    def normalize(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` of the files' type to floats as the encoder knows them."""
        mean, std = self.statistics.to(images.device)
        normalised: Tensor = (self.frames.to(images.device).scale(images) - mean) / std
        return normalised


class _Crops(Dataset[Any]):
    def __init__(self, data: SegmentationData) -> None:
        self.data = data

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor] | UserError:
        try:
            pair = self.data.pair(self.data.train, key[1])
        except UserError as mistake:  # an exception loses its three lines on the way out of a loader process
            return mistake
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator: key it for this image
            torch.default_generator.manual_seed(derive_seed(self.data.seed, "segment crop", *key))
            return self.data.crops(*pair)


class _Whole(Dataset[Any]):
    def __init__(self, data: SegmentationData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.test)

    def __getitem__(self, index: int) -> Scored | UserError:
        try:
            return self.data.scored(self.data.test, index)
        except UserError as mistake:
            return mistake


def _stack(samples: list[Any]) -> Any:  # noqa: ANN401 - a batch, or the mistake that is found in it
    mistakes = [sample for sample in samples if isinstance(sample, UserError)]
    if mistakes:
        return mistakes[0]
    images, classes = zip(*samples, strict=True)
    return stacked(images), torch.stack(classes)


def _shape(image: Tensor, side: float) -> list[int]:
    """Height and width with which the shorter side of ``(C, H, W)`` is ``side``."""
    return [max(1, round(length * side / min(image.shape[1:]))) for length in image.shape[1:]]


def _resized(image: Tensor, side: float, filling: Sequence[float]) -> tv_tensors.Image:
    bilinear = v2.InterpolationMode.BILINEAR
    return tv_tensors.Image(resized(image, _shape(image, side), filling, bilinear))


def _padded(image: Tensor, room: Sequence[int], fill: Sequence[float]) -> Tensor:
    """``(C, H, W)`` with a border of ``fill``, in its own type; torchvision's padding does not know uint16."""
    padded: Tensor = v2.functional.pad(
        image.float() if image.dtype == torch.uint16 else image, list(room), fill=list(fill)
    )
    return padded.to(image.dtype)


def _resized_classes(classes: Tensor, shape: list[int]) -> tv_tensors.Mask:
    """``(1, *shape)``: the class at the centre of a pixel; torchvision's way for masks is half a pixel off."""
    nearest = v2.functional.resize_image(classes[None], shape, interpolation=v2.InterpolationMode.NEAREST_EXACT)
    return tv_tensors.Mask(nearest)

"""Features of images without labels: batch by batch, for whoever keeps them in memory or on a disk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mim.data.bad_files import BadFiles
from mim.data.builtin import open_built_in
from mim.data.labelled import Framed, Frames, framed_batches
from mim.data.objects import is_object, open_object
from mim.data.pixels import EIGHT_BIT
from mim.data.places import BUILT_IN
from mim.data.pretrain import check_numbers
from mim.data.sources import Source, open_source
from mim.errors import UserError
from mim.evaluation.features import Features, evaluating
from mim.run.weights import LoadedEncoder

ClassPool = Literal["cls", "mean", "both"]


class Rows(NamedTuple):
    """Some images that could be read, in their order.

    Args:
        names: of ``B`` images.
        pooled: ``(B, F)`` float32.
        patches: ``(B, h, w, D)`` float32, row by row from the upper left; None if nobody wants them.
    """

    names: list[str]
    pooled: Tensor
    patches: Tensor | None


@dataclass(frozen=True)
class Extraction:
    """What is read from an encoder, and how images are shown to it.

    Args:
        loaded: the encoder, on ``device``.
        features: which vector stands for an image.
        patch: whether patch features are wanted, too.
        frames: how images are cut and normalised.
        batch_size: images encoded at once.
        num_workers: loader processes.
        device: where the encoder computes.
    """

    loaded: LoadedEncoder
    features: Features
    patch: bool
    frames: Frames
    batch_size: int
    num_workers: int
    device: torch.device

    @classmethod
    def of(
        cls,
        loaded: LoadedEncoder,
        pool: ClassPool,
        layers: int,
        patch: bool,
        *,
        crop_pct: float,
        batch_size: int,
        num_workers: int,
        device: torch.device,
    ) -> "Extraction":
        """Moves the encoder to the device and checks that it has what is asked for.

        Raises:
            UserError: if it has no class token, or fewer blocks.
        """
        features, frames = Features(layers, pool), Frames(crop_pct)
        encoder = loaded.encoder.to(device)
        frames.configure(encoder.img_size, loaded.mean, loaded.std, loaded.pixels)
        try:
            features.shape(encoder)
        except ValueError as error:
            raise UserError(f"--pool {pool} --layers {layers}: {error}", hint="--pool mean --layers 1") from error
        return cls(loaded, features, patch, frames, batch_size, num_workers, device)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one image's features by their kind: ``class (F,)`` and ``patch (h, w, D)``."""
        encoder = self.loaded.encoder
        pooled = {"class": self.features.shape(encoder)}
        return pooled | ({"patch": (*encoder.grid, encoder.dim)} if self.patch else {})

    def facts(self) -> dict[str, Any]:
        """How the features came about, for those who use them later."""
        size = "x".join(map(str, self.frames.size))
        seen = f"{size} px, centre crop {self.frames.crop_pct:g}"
        statistics = {"mean": self.loaded.mean, "std": self.loaded.std}
        scale = {} if self.loaded.pixels == EIGHT_BIT else {"pixels": self.loaded.pixels.facts()}
        return {"note": self.loaded.note, "class": self.features.describe(), "images_seen": seen, **statistics, **scale}

    def rows(self, sources: Sequence[Source], bad: BadFiles) -> Iterator[Rows]:
        """The features of all readable images, source after source; the others are added to ``bad``.

        Raises:
            UserError: if a feature is NaN or infinite, or more files are unreadable than ``bad`` tolerates.
        """
        encoder = self.loaded.encoder
        with evaluating(encoder), torch.inference_mode():
            for source in sources:
                framed, first = Framed(source, self.frames, range(len(source))), 0
                for images, _, unreadable in framed_batches(framed, self.batch_size, self.num_workers, self.device):
                    names = [source.describe(index) for index in range(first, first + len(images))]
                    first += len(images)
                    bad.add(*unreadable)
                    bad.stop_if_too_many()
                    missing = {name for name, _ in unreadable}
                    kept = [place for place, name in enumerate(names) if name not in missing]
                    if kept:
                        yield self._encoded([names[place] for place in kept], images[kept])

    def _encoded(self, names: list[str], images: Tensor) -> Rows:
        if self.patch:
            pooled, patches = self.features.with_patches(self.loaded.encoder, images)
        else:
            pooled, patches = self.features.of(self.loaded.encoder, images), None
        if not pooled.isfinite().all():
            raise UserError("the features hold NaN or infinite values", why="the encoder's weights have diverged")
        return Rows(names, pooled, patches)


def all_images(data: str, loaded: LoadedEncoder) -> tuple[list[Source], str | None]:
    """Every image that ``--data`` names: those to learn from, then those that it sets apart; and a note on numbers.

    Raises:
        UserError: if there are none, or of other numbers or channels than the encoder takes.
    """
    channels = loaded.encoder.in_chans
    if data in BUILT_IN:
        return [*open_built_in(data, channels, loaded.pixels)], None
    opened = open_object(data, channels) if is_object(data) else open_source(data, channels, same_classes=False)
    sources = [source for source in opened if source is not None]
    for source in sources:
        source.pixels = loaded.pixels
    return [*sources], check_numbers(data, sources[0], channels, loaded.pixels)


def chosen_device(device: str) -> torch.device:
    """What ``--device`` names: auto takes a GPU if there is one.

    Raises:
        UserError: if a GPU is asked for and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here", hint="--device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")

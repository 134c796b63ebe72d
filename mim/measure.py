"""The frame of every evaluation: opens weights and labelled images, gives features, writes results into the run."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mim.checkpoint import LoadedEncoder, load_encoder, untrained_encoder
from mim.data.labelled import Framed, Frames, LabelledImages, Part, fingerprint, framed_batches, open_labelled
from mim.data.pixels import EIGHT_BIT
from mim.data.pretrain import BadFiles, check_numbers
from mim.data.sources import Source
from mim.encoder import Encoder
from mim.errors import UserError
from mim.evaluation.bank import Bank, cached_bank
from mim.evaluation.features import Features
from mim.evaluation.splits import stratified_split
from mim.outputs import check_folder
from mim.randomness import derive_seed
from mim.reduction import Labels
from mim.reduction.macs import count_macs
from mim.reduction_io import build_reduction
from mim.report import write_report
from mim.report.tables import spread, text_table
from mim.run import evaluation_folder
from mim.subject import Subject

TRAINED, UNTRAINED = "pretrained", "untrained"

Job = TypeVar("Job")
Result = TypeVar("Result")

Scores = dict[str, dict[str, list[float]]]
"""Shares of 1 by what was measured, then by encoder (:data:`TRAINED`, :data:`UNTRAINED`), one value per seed."""


@dataclass(frozen=True)
class Measurement:
    """An encoder and labelled images, opened.

    Args:
        subject: what was asked for.
        loaded: the encoder, on the device.
        train: images to learn from.
        test: images to be scored on.
        classes: names by label.
        frames: how images are cut and normalised.
        device: where encoders compute.
        split: where the scored images come from, in words.
        learning: a token reduction may have weights of its own, since they are going to be trained.
    """

    subject: Subject
    loaded: LoadedEncoder
    train: Source
    test: Source
    classes: list[str]
    frames: Frames
    device: torch.device
    split: str
    learning: bool = False

    @classmethod
    def open(cls, subject: Subject, learning: bool = False) -> "Measurement":
        """Loads the weights, then the images; joins the other processes if torchrun started several."""
        if subject.out:
            check_folder("--out", Path(subject.out))
        device = join_processes(subject.device)
        loaded = load_encoder(subject.weights, model=subject.model, img_size=subject.img_size, trust=subject.trust)
        encoder = loaded.encoder.to(device)
        frames = Frames(subject.crop_pct)
        frames.configure(encoder.img_size, loaded.mean, loaded.std, loaded.pixels)
        images = open_labelled(subject.data, encoder.in_chans, subject.classes, loaded.pixels)
        note = check_numbers(subject.data, images.train, encoder.in_chans, loaded.pixels)
        train, test, split = _parts(images, subject.val_fraction)
        measurement = cls(subject, loaded, train, test, images.classes, frames, device, split, learning)
        measurement.reduce(encoder)
        if measurement.first:
            print(
                f"  weights {loaded.note}\n  data    {subject.data}: {len(images.classes)} classes, {split}", flush=True
            )
            if note:
                print(f"  note    {note}", flush=True)
            if encoder.reduction is not None:
                print(f"  tokens  {encoder.reduction.describe()}", flush=True)
        return measurement

    @property
    def first(self) -> bool:
        """Whether this process is the one that scores and writes."""
        return not dist.is_initialized() or dist.get_rank() == 0

    def reduce(self, encoder: Encoder, seed: int = 0) -> Encoder:
        """The same encoder with the reduction that was asked for, if any; ``seed`` draws what it is going to learn."""
        if self.subject.reduction is not None:
            labels = Labels(len(self.classes)) if self.learning else None
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(seed, "reduction"))
                encoder.reduction = build_reduction(self.subject.reduction, encoder.vit, labels).to(self.device).eval()
        return encoder

    def reloaded(self) -> Encoder:
        """Another copy of the encoder, for a training that takes it apart."""
        return deepcopy(self.loaded.encoder)

    def untrained(self, seed: int) -> Encoder:
        """The same encoder before training, as ``seed`` draws it, on the device."""
        subject = self.subject
        encoder = untrained_encoder(
            subject.weights, seed, model=subject.model, img_size=subject.img_size, trust=subject.trust
        )
        return self.reduce(encoder.to(self.device))

    def banks(self, encoder: Encoder, features: Features, crops: int = 0) -> tuple[list[Bank], Bank]:
        """Features to learn from, one bank per random crop or one of centre crops, and those to be scored on.

        All processes call it together.
        """
        try:
            learnt = [self._bank(encoder, features, self.train, (0, number)) for number in range(crops)]
            learnt = learnt or [self._bank(encoder, features, self.train)]
            return learnt, self._bank(encoder, features, self.test)
        except ValueError as error:
            raise UserError(f"--weights {self.subject.weights}: {error}", hint="--pool mean --layers 1") from error

    def protocol(self) -> str:
        """How images are shown to the encoder and which are scored, in words."""
        size = "x".join(map(str, dict.fromkeys(self.frames.size)))
        return f"{size} px, centre crop {self.subject.crop_pct:g}; {self.split}{in_words(self.loaded.encoder)}"

    def write(
        self, folder: Path, title: str, protocol: str, scores: Scores, details: dict[str, Any] | None = None
    ) -> None:
        """Prints the results and writes them into the folder, to be followed by pictures and :func:`finish_section`."""
        metrics = {
            what if who == TRAINED else f"{what}, {who}": values
            for what, groups in scores.items()
            for who, values in groups.items()
        }
        print(f"\n{title}: {protocol}\n")
        rows = [[what, *(spread(by.get(who, [])) for who in (TRAINED, UNTRAINED))] for what, by in scores.items()]
        print(text_table(["", TRAINED, UNTRAINED], rows))
        content = {"title": title, "protocol": protocol, "metrics": metrics | (details or {})}
        content |= {"weights": self.subject.weights, "data": self.subject.data, "note": self.loaded.note}
        content |= reduction_facts(self.loaded.encoder, self.subject.reduction)
        (folder / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")

    def folder(self, name: str) -> Path:
        """Where results go: an evaluation with a reduction does not replace the one without."""
        return evaluation_folder(self.subject.weights, self.subject.out, section_name(name, self.subject.reduction))

    def _bank(self, encoder: Encoder, features: Features, source: Source, crop: tuple[int, int] | None = None) -> Bank:
        bad = BadFiles(self.subject.max_bad, self.subject.data)
        bad.total = len(source)

        def batches(rows: range) -> Iterator[tuple[Tensor, Tensor]]:
            framed = Framed(source, self.frames, rows, crop)
            for images, labels, unreadable in framed_batches(
                framed, self.subject.encode_batch, self.workers, self.device
            ):
                bad.add(*unreadable)
                bad.stop_if_too_many()
                yield images, labels

        facts: dict[str, Any] = {"images": fingerprint(source), "size": self.frames.size, "crop": crop}
        facts |= {"crop_pct": self.subject.crop_pct, "mean": self.loaded.mean, "std": self.loaded.std}
        if self.loaded.pixels != EIGHT_BIT:
            facts["pixels"] = self.loaded.pixels.facts()
        if encoder.reduction is not None:
            facts["reduction"] = encoder.reduction.describe()
        return cached_bank(self.subject.cache, encoder, features, len(source), facts, batches)

    @property
    def workers(self) -> int:
        """Loader processes."""
        given = self.subject.num_workers
        return min(16, len(os.sched_getaffinity(0))) if given is None else given


def share_out(jobs: Sequence[Job], work: Callable[[Job], Result]) -> list[Result]:
    """The results of all jobs in their order, on every process; each process does its share of them, alone."""
    if not dist.is_initialized():
        return [work(job) for job in jobs]
    rank, world = dist.get_rank(), dist.get_world_size()
    shares: list[list[Result]] = [[] for _ in range(world)]
    dist.all_gather_object(shares, [work(job) for job in jobs[rank::world]])
    return [shares[number % world][number // world] for number in range(len(jobs))]


def finish_section(folder: Path) -> None:
    """Puts the results into the run's report, if they lie in a run, and says where they are."""
    run = folder.parents[1] if folder.parent.name == "evaluation" else None
    print(f"  results {folder / 'metrics.json'}")
    if run is not None and (run / "config.yaml").is_file():
        print(f"  report  {write_report(run)}")


def section_name(name: str, reduction: str | None) -> str:
    """``knn-tome-8`` for an evaluation ``knn`` of a reduced encoder."""
    if reduction is None:
        return name
    file = Path(reduction)
    return f"{name}-{file.stem if file.suffix in ('.yaml', '.yml') else file.name.replace(':', '-')}"


def reduction_facts(encoder: Encoder, name: str | None) -> dict[str, Any]:
    """What ``metrics.json`` says about the reduction; nothing if there is none."""
    if encoder.reduction is None:
        return {}
    whole, reduced = (count_macs(encoder.vit, reduction).total for reduction in (None, encoder.reduction))
    facts = {"name": name, "settings": encoder.reduction.describe(), "multiply_adds": reduced}
    return {"reduction": facts | {"share_of_multiply_adds": reduced / whole}}


def in_words(encoder: Encoder) -> str:
    """The reduction for the line that states the protocol; empty if there is none."""
    if encoder.reduction is None:
        return ""
    share = count_macs(encoder.vit, encoder.reduction).total / count_macs(encoder.vit).total
    return f"; tokens reduced by {encoder.reduction.describe()}, {share:.0%} of the multiply-adds"


def join_processes(device: str) -> torch.device:
    """The device of this process; waits for the others if torchrun started several.

    Raises:
        UserError: if a GPU is asked for and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here", hint="--device cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo")
    if not cuda:
        return torch.device("cpu")
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(place)
    return place


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

"""mim from Python: the commands as functions, with their names, their checks and their results.

    import mim

    run = mim.pretrain(data="photos", method="mae", epochs=100)
    vit = run.backbone()                                      # a timm model
    encoder, transform, *_ = mim.load(run)
    vectors, patches, names, _ = mim.features(run, "photos")  # (M, F), (M, h, w, D), M names
    scores = mim.knn(run, data="labelled")

Options are those of ``python tools/NAME.py --help``. A mistake raises :class:`mim.UserError`, what the machine lacks
its subclass ``MachineError``; nothing exits. Signal handlers, threads, random numbers and whatever else a run sets for
its process are afterwards as they were.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypedDict, Unpack, cast

import timm
import torch
from torch import Tensor

from mim.callbacks.run_log import MetricsTable
from mim.cli import call, in_short
from mim.commands import finetune as finetune_command
from mim.commands import knn as knn_command
from mim.commands import linear_probe as linear_probe_command
from mim.commands import segment as segment_command
from mim.commands.pretrain import trained
from mim.data.bad_files import BadFiles
from mim.data.labelled import Frames
from mim.data.loading import loader_processes
from mim.data.objects import handed_over, is_object
from mim.data.places import PREFIX
from mim.data.transform import Transform
from mim.distributed.processes import INTERRUPTED, process_rank
from mim.encoder import Encoder
from mim.errors import MACHINE_ERRORS, InterruptedRunError, StoppedError, UserError
from mim.evaluation.features import Pool
from mim.memory import MemoryViT
from mim.memory import load_memory as open_memory
from mim.options.class_paths import plugins
from mim.options.evaluation import Scores
from mim.options.pretraining import translate
from mim.program import asked_from_python
from mim.run.failures import as_machine_error
from mim.run.folder import RunFolder, quieten
from mim.run.surroundings import left_as_they_were
from mim.run.weights import LoadedEncoder, load_encoder
from mim.transfer.features import ClassPool, Extraction, all_images, chosen_device
from mim.vit import ViT

__all__ = [
    "Features",
    "Loaded",
    "Run",
    "Scores",
    "features",
    "finetune",
    "knn",
    "linear_probe",
    "load",
    "pretrain",
    "segment",
]


class Items(Protocol):
    """A data set of Python: a torch ``Dataset`` with a length, one of Hugging Face, or a list of pictures."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int, /) -> Any:  # noqa: ANN401 - a picture, or a tuple or mapping with one
        """An image, alone or with other things."""
        ...


Images: TypeAlias = str | os.PathLike[str] | Items
"""What ``data=`` takes: all that ``--data`` does, or a data set; ``mim/data/objects.py`` says what its items may be."""
Weights: TypeAlias = str | os.PathLike[str]
"""A run, a run folder, a timm folder, a checkpoint file, or a timm name."""
Option: TypeAlias = str | os.PathLike[str] | bool | float | Sequence[str] | Sequence[float] | None
"""A value of an option; None leaves it out."""


class PretrainOptions(TypedDict, total=False):
    """The options of :func:`pretrain`, as ``python tools/pretrain.py --help`` explains them."""

    model: str
    epochs: float
    batch_size: int
    out: str | os.PathLike[str]
    init: Weights
    config: str | os.PathLike[str]
    img_size: int | Sequence[int]
    patch_size: int
    in_chans: int
    lora: int
    registers: int
    label_column: str | int
    continue_: Weights
    value_range: str | Sequence[float]
    clip: bool
    log_values: bool
    bands: str | Sequence[int]
    nodata: float
    windows: int
    stride: int
    mask_ratio: float
    blr: float
    seed: int
    accumulate: int
    devices: int
    strategy: str
    precision: str
    compile: bool
    threads: int
    num_workers: int
    max_bad: float
    save_every: float
    eval_every: float
    pictures: int
    pool: Literal["mean", "cls"]
    probe_images: int
    log: str | Sequence[str]
    log_every: int
    profile: int
    overwrite: bool
    allow_change: str | Sequence[str]
    trust: bool


@dataclass(frozen=True)
class Run:
    """A run of pretraining on disk, finished or not; stands for its folder wherever weights are asked for.

    Args:
        path: its folder.
    """

    path: Path

    def __post_init__(self) -> None:
        """Refuses a folder that is no run."""
        object.__setattr__(self, "path", Path(self.path))
        if not (self.path / "config.yaml").is_file():
            raise UserError(f"{self.path} is no run", hint="mim.pretrain(out=FOLDER) makes one")

    def __fspath__(self) -> str:
        """The folder."""
        return str(self.path)

    def backbone(self, **settings: Any) -> ViT:  # noqa: ANN401 - timm's
        """The trained encoder as a timm model; ``settings`` are those of ``timm.create_model``, as ``num_classes``.

        Raises:
            UserError: if the run has not finished; ``mim.load(run)`` gives its newest checkpoint.
        """
        folder = self.path / "export" / "backbone"
        if not folder.is_dir():
            raise UserError(f"{self.path} has exported no backbone yet", hint=f"mim.load({str(self.path)!r})")
        return cast(ViT, timm.create_model(f"local-dir:{folder}", pretrained=True, **settings))

    @property
    def metrics(self) -> dict[str, list[float]]:
        """The table of ``metrics.csv`` by column, such as ``step``, ``train/loss`` and ``val/knn_top1``.

        Columns are equally long; where nothing was measured stands NaN. ``pandas.DataFrame(run.metrics)`` works.
        """
        table = MetricsTable(RunFolder(self.path).metrics)
        rows = [table.rows[step] for step in sorted(table.rows)]
        return {name: [float(row.get(name) or nan) for row in rows] for name in table.columns}

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps at which a metric was measured, and its values: what a plot wants."""
        metrics = self.metrics
        if name not in metrics:
            raise UserError(f"{self.path} has measured no {name}", hint=", ".join(metrics))
        measured = [
            (int(step), value) for step, value in zip(metrics["step"], metrics[name], strict=True) if value == value
        ]
        return [step for step, _ in measured], [value for _, value in measured]

    @property
    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` says: final numbers, versions, ``status``."""
        return RunFolder(self.path).read_summary()

    @property
    def report(self) -> Path:
        """The page with curves, pictures and settings."""
        return self.path / "report.html"


class Loaded(NamedTuple):
    """An encoder with what prepares its images.

    Args:
        encoder: ``encoder(images)`` gives ``(B, P + N, D)``: prefix tokens (class token first), then those of the
            patches, row by row; ``encoder.feature_map(images)`` gives ``(B, D, h, w)``; ``encoder.vit`` is timm's.
        transform: one picture (PIL, path, or a tensor of the type that the encoder was trained on) to ``(C, H, W)``;
            ``torch.stack`` makes a batch of several.
        note: where the weights come from, and what was done to make them fit.
        pool: what stands for an image: ``cls`` or ``mean``, its run's choice or what timm's model pools by.
    """

    encoder: Encoder
    transform: Transform
    note: str
    pool: Pool


class Features(NamedTuple):
    """Features of the images that could be read, in their order.

    Args:
        vectors: ``(M, F)`` float32, one for each image; ``F`` is the encoder's width ``D``, times ``layers``.
        patches: ``(M, h, w, D)`` float32, row by row from the upper left; None unless asked for.
        names: of the ``M`` images: paths, or ``list[3]`` for the fourth of a list.
        unreadable: reasons by the names of images that were left out.
    """

    vectors: Tensor
    patches: Tensor | None
    names: list[str]
    unreadable: dict[str, str]


def pretrain(
    data: Images | None = None,
    method: str | None = None,
    *,
    resume: Weights | None = None,
    settings: Mapping[str, Option] | None = None,
    plugin: str | Sequence[str] = (),
    **options: Unpack[PretrainOptions],
) -> Run:
    """Pretrains a Vision Transformer on images without labels; blocks until it has finished.

    Args:
        data: folder, list, tar shards, ``builtin`` (the default), ``shapes``, or a data set. Items of a data set come
            in the same keyed order as files; labels (``targets``, a ``ClassLabel`` column) serve the probes alone.
        method: recipe to start from; ``mae`` unless given.
        resume: a run to continue, or ``auto``. Of one on a data set of Python, ``data`` must be that again: its class
            and length are compared.
        settings: every other setting by its dotted name, as ``{"model.init_args.decoder_depth": 4}``.
        plugin: packages of your own, imported by this call, whose classes a config may name.
        options: those of the command, by the same names.

    Raises:
        UserError: a mistake; ``DivergedError`` if numbers are not finite, ``MachineError`` if the machine failed.
        InterruptedRunError: after a signal such as Ctrl-C; the step that was running is saved.
    """
    with _command(plugin), handed_over("" if data is None else data) as name:
        # What stands later wins over a config file, which so comes first.
        given: dict[str, Any] = {"config": options.pop("config", None), "data": None if data is None else name}
        given |= {"method": method, "resume": resume, **options, **(settings or {})}
        try:
            with asked_from_python(_in_words("pretrain", given | {"plugin": plugin or None})):
                status, folder = trained(translate(_arguments(given)))
        except UserError as error:
            raise in_short(error) from error
        if status == INTERRUPTED:
            raise InterruptedRunError(
                f"a signal stopped {folder.path}; the step that was running is saved",
                hint=f"mim.pretrain(resume={str(folder.path)!r}), with the same data= if that was a data set",
            )
    return Run(folder.path)


def load(
    weights: Weights,
    *,
    model: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    dynamic_img_size: bool = False,
    crop_pct: float = 1.0,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    trust: bool = False,
    plugin: str | Sequence[str] = (),
) -> Loaded:
    """The encoder of a run, a timm folder, a checkpoint file or a timm name, in evaluation mode.

    Args:
        weights: what to load.
        model: timm name of the model that a checkpoint file belongs to, if its shapes do not tell.
        img_size: pixels per side, or (height, width), instead of the model's own; positions are resized.
        dynamic_img_size: accept images of any size that patches tile.
        crop_pct: side of the middle that the transform shows as a share of the resized image's shorter side.
        device: where the encoder is put.
        trust: load a checkpoint file although it can run code.
        plugin: packages of your own that an unfinished run was trained with.

    Raises:
        UserError: if nothing is found or the weights do not fit.
    """
    with _command(plugin):
        loaded = load_encoder(
            os.fspath(weights), model=model, img_size=img_size, dynamic_img_size=dynamic_img_size, trust=trust
        )
        encoder = loaded.encoder.to(chosen_device(device))
        frames = Frames(crop_pct)
        frames.configure(encoder.img_size, loaded.mean, loaded.std, loaded.pixels)
    return Loaded(encoder, Transform(frames, encoder.in_chans), loaded.note, loaded.pool)


def load_memory(weights: Weights) -> MemoryViT:
    """A frozen encoder with the tasks that ``finetune(..., memory=5)`` has taught it, in evaluation mode.

    ``model.by_task(images)`` gives logits ``(B, classes)`` by task, ``original`` for the classifier that the encoder
    came with, and ``model.tasks[name].class_names`` what they stand for. Images are prepared as by
    ``load(weights).transform``.

    Args:
        weights: the ``export`` of such a fine-tuning.

    Raises:
        UserError: if there is no memory.
    """
    with _command():
        return open_memory(os.fspath(weights), "weights")


def features(
    weights: Weights | Loaded,
    images: Images,
    *,
    pool: ClassPool | None = None,
    patch: bool = True,
    layers: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    model: str | None = None,
    img_size: int | None = None,
    crop_pct: float = 1.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    trust: bool = False,
    plugin: str | Sequence[str] = (),
) -> Features:
    """Features of images, in memory; ``tools/features.py`` writes them to a disk batch by batch.

    Args:
        weights: what to load, or what :func:`load` has loaded, whose size and transform then count.
        images: a folder (all images below it, sorted by path), a list, tar shards, ``builtin``, or a data set or list
            of pictures. Of a folder with ``train/`` and ``val/``, the latter's images come last.
        pool: what ``vectors`` are: the class token (``cls``), the ``mean`` of the patch tokens, or ``both`` end to end;
            what the run or the model pools by unless given.
        patch: give patch features, too: ``h * w * D`` numbers for each image.
        layers: last blocks whose class tokens, or means, are put end to end.
        batch_size: images encoded at once.
        num_workers: loader processes.
        model: as in :func:`load`.
        img_size: as in :func:`load`.
        crop_pct: as in :func:`load`.
        device: where to compute; features come back to the CPU.
        trust: as in :func:`load`.
        plugin: as in :func:`load`.

    Raises:
        UserError: if no image can be read, or the model has no class token to pool.
    """
    if not isinstance(weights, Loaded):
        weights = load(weights, model=model, img_size=img_size, crop_pct=crop_pct, trust=trust, plugin=plugin)
    frames = weights.transform.frames
    statistics = frames.mean.tolist(), frames.std.tolist()
    loaded = LoadedEncoder(weights.encoder, *statistics, weights.note, weights.pool, frames.pixels)
    with _command(), handed_over(images) as name:
        extraction = Extraction.of(
            loaded,
            pool or weights.pool,
            layers,
            patch,
            crop_pct=frames.crop_pct,
            batch_size=batch_size,
            num_workers=loader_processes(num_workers),
            device=chosen_device(device),
        )
        bad = BadFiles(1.0, name)
        sources, note = all_images(name, loaded)
        bad.total = sum(map(len, sources))
        if note:
            print(f"note: {name}: {note}", flush=True)
        rows = list(extraction.rows(sources, bad))
    if not rows:
        raise UserError(f"none of the {bad.total:,} images can be read", why=next(iter(bad.reasons.values()), None))
    patches = [row.patches.cpu() for row in rows if row.patches is not None]
    return Features(
        torch.cat([row.pooled.cpu() for row in rows]).clone(),
        torch.cat(patches).clone() if patches else None,
        [name for row in rows for name in row.names],
        bad.reasons,
    )


def knn(weights: Weights, data: Images = "builtin", *, plugin: str | Sequence[str] = (), **options: Option) -> Scores:
    """k-NN accuracy of frozen features, beside untrained encoders.

    Args:
        weights: what to measure.
        data: labelled images.
        plugin: packages of your own that the run was trained with.
        options: those of ``python tools/knn.py``, as ``k=[10, 20]``.

    Returns:
        Shares of 1 by what was measured (``20-NN top-1``), then by encoder (``pretrained``, ``untrained``), one for
        each seed. They are also in ``metrics.json`` and, for a run, in its report.
    """
    return _evaluation("knn", knn_command.run, weights, data, plugin, options)


def linear_probe(
    weights: Weights, data: Images = "builtin", *, plugin: str | Sequence[str] = (), **options: Option
) -> Scores:
    """Accuracy of a linear or attentive classifier on frozen features, beside untrained encoders.

    Args:
        weights: what to measure.
        data: labelled images.
        plugin: packages of your own that the run was trained with.
        options: those of ``python tools/linear_probe.py``, as ``epochs=20`` or ``head="attentive"``.

    Returns:
        As :func:`knn`: ``top-1`` and ``top-5``.
    """
    return _evaluation("linear_probe", linear_probe_command.run, weights, data, plugin, options)


def finetune(
    weights: Weights, data: Images = "builtin", *, plugin: str | Sequence[str] = (), **options: Option
) -> Scores:
    """Accuracy after training encoder and classifier together, beside the same training from scratch.

    Args:
        weights: what to start from.
        data: labelled images.
        plugin: packages of your own that the run was trained with.
        options: those of ``python tools/finetune.py``, as ``epochs=50`` or ``from_scratch=False``.

    Returns:
        As :func:`knn`: ``top-1`` and ``top-5``.

    Raises:
        InterruptedRunError: after a signal; ``resume=True`` goes on.
    """
    return _evaluation("finetune", finetune_command.run, weights, data, plugin, options)


def segment(
    weights: Weights, data: str | os.PathLike[str] = "builtin", *, plugin: str | Sequence[str] = (), **options: Option
) -> Scores:
    """Semantic segmentation with a head on frozen or fine-tuned features, beside untrained encoders.

    Args:
        weights: what to measure.
        data: folder of images and masks, ``builtin`` or ``shapes``.
        plugin: packages of your own that the run was trained with.
        options: those of ``python tools/segment.py``, as ``head="knn"`` or ``steps=1000``.

    Returns:
        As :func:`knn`: ``mIoU`` and ``pixel accuracy``.

    Raises:
        InterruptedRunError: after a signal; ``resume=True`` goes on.
    """
    return _evaluation("segment", segment_command.run, weights, data, plugin, options)


def _evaluation(
    command: str,
    run: Callable[..., Scores],
    weights: Weights,
    data: Images,
    plugin: str | Sequence[str],
    options: Mapping[str, Option],
) -> Scores:
    with _command(plugin), handed_over(data) as name:
        given = {"weights": weights, "data": name, **options}
        with asked_from_python(_in_words(command, given | {"plugin": plugin or None})):
            scores: Scores = call(run, command, _arguments(given))
    return scores


@contextmanager
def _command(plugin: str | Sequence[str] = ()) -> Iterator[None]:
    """What surrounds a command: plugins in, failures of the machine told as such, the process left as it was."""
    names = plugin.split(",") if isinstance(plugin, str) else plugin
    with left_as_they_were(), plugins([name.strip() for name in names if name.strip()]):
        quieten(process_rank())
        try:
            yield
        except MACHINE_ERRORS as error:
            if (failure := as_machine_error(error)) is None:
                raise
            raise failure from error
        except StoppedError:
            raise InterruptedRunError("a signal stopped the training, which is saved", hint="resume=True") from None


def _arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line has them; those that are None are left out."""
    return [f"--{name.rstrip('_')}={_text(value)}" for name, value in options.items() if value is not None]


def _in_words(function: str, options: Mapping[str, Any]) -> str:
    """A call of one of these functions, as it may be typed again but for a data set, which is named alone."""
    dotted = {name: value for name, value in options.items() if "." in name and value is not None}
    plain = {name: value for name, value in options.items() if "." not in name and value is not None}
    words = [f"{name}={_literal(value)}" for name, value in plain.items()]
    words += [f"settings={{{', '.join(f'{name!r}: {_literal(value)}' for name, value in dotted.items())}}}"] * bool(
        dotted
    )
    return f"mim.{function}({', '.join(words)})"


def _literal(value: object) -> str:
    if isinstance(value, str) and is_object(value):
        return value.removeprefix(PREFIX)
    return repr(os.fspath(value) if isinstance(value, os.PathLike) else value)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, Sequence):
        names = all(isinstance(item, str) for item in value)
        return ",".join(value) if names and value else json.dumps(list(value))
    return repr(value)

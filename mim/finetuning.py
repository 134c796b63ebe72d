"""One fine-tuning after another, pretrained and from scratch, each resumable where it was stopped."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mim.checkpoint import ModelCard, export_backbone
from mim.data.augment import Augmented
from mim.data.finetune import FinetuneData
from mim.data.labelled import Framed, framed_batches
from mim.data.pretrain import BadFiles
from mim.encoder import Encoder
from mim.errors import UserError
from mim.evaluation.finetune import Finetune, classifier
from mim.interop import check_timm_folder
from mim.measure import Measurement, section_name
from mim.reduction import TokenReducedViT
from mim.reduction_io import save_reduction, save_settings
from mim.subject import FinetuneRecipe
from mim.supervised import fit, keep_result, open_trainer


@dataclass(frozen=True)
class Machine:
    """What fine-tuning runs on.

    Args:
        devices: processes, one per device.
        accumulate: micro-batches per step.
        precision: Lightning's name of it.
        eval_every: epochs between looks at the scored images.
    """

    devices: int
    accumulate: int
    precision: str
    eval_every: float


def train(
    measurement: Measurement,
    encoder: Encoder,
    recipe: FinetuneRecipe,
    machine: Machine,
    seed: int,
    folder: Path,
    resume: bool,
) -> Finetune:
    """Trains to the end and scores the result.

    Args:
        measurement: images and where to compute.
        encoder: is taken apart.
        recipe: how.
        machine: on what.
        seed: of everything random.
        folder: for checkpoints.
        resume: go on from the newest of them.

    Returns:
        The trained module, whose ``history`` ends with the final scores.

    Raises:
        StoppedError: after a signal.
    """
    classes = len(measurement.classes)
    frames = Augmented(measurement.subject.crop_pct, recipe.scale, recipe.auto_augment, recipe.erase)
    frames.configure(encoder.img_size, measurement.loaded.mean, measurement.loaded.std, measurement.loaded.pixels)
    data = FinetuneData(
        measurement.train,
        measurement.test,
        frames,
        recipe.batch_size,
        measurement.workers,
        seed,
        BadFiles(measurement.subject.max_bad, measurement.subject.data, go_on="--resume true"),
    )
    reduction = measurement.reduce(encoder, seed).reduction
    vit = classifier(encoder, classes, recipe, seed)
    teacher = None if recipe.teacher is None else _teacher(recipe.teacher, vit, measurement)
    module = Finetune(vit, recipe, classes, len(measurement.train), seed, reduction, teacher)
    every = max(1, round(machine.eval_every * module.steps_per_epoch))
    trainer = open_trainer(
        folder,
        module.max_steps,
        every,
        accelerator="cpu" if measurement.device.type == "cpu" else "gpu",
        devices=machine.devices,
        precision=machine.precision,
        accumulate=machine.accumulate,
        validate_every=every,
        bad_files=data.bad_files,
    )
    fit(trainer, module, data, folder, resume, "a lower --blr   or   --warmup_epochs 20")
    trainer.validate(module, data, verbose=False)
    return module


def finish(module: Finetune, folder: Path) -> None:
    """Keeps the scores in place of the checkpoints."""
    keep_result(folder, "history.json", module.history)


def export(module: Finetune, measurement: Measurement, folder: Path, command: str) -> float:
    """Writes the trained classifier as a timm folder; returns the difference of timm's copy, which is 0."""
    card = ModelCard(
        method="fine-tuning",
        data=measurement.subject.data,
        data_licence="unknown",
        images=len(measurement.train),
        epochs=module.recipe.epochs,
        steps=module.max_steps,
        command=command,
        notes=(f"Classes, in order: {', '.join(measurement.classes)}",),
    )
    model = module.evaluated.cpu().eval()
    vit: VisionTransformer = model.vit if isinstance(model, TokenReducedViT) else model
    loaded = measurement.loaded
    extra = {"fc_norm": module.recipe.pool == "mean"}
    scale = loaded.pixels.exported(loaded.mean, loaded.std)
    difference = export_backbone(vit, folder, card=card, model_args=extra, **scale)
    if isinstance(model, TokenReducedViT):
        save_reduction(model.reduction, folder)
        static = model.static(_some_images(measurement))
        if static is not model.reduction:
            save_settings(static, folder / f"{section_name('static', measurement.subject.reduction)}.yaml")
    return difference


def _teacher(folder: str, vit: VisionTransformer, measurement: Measurement) -> VisionTransformer:
    """The classifier that ``--teacher`` names, on the device; it must be what is trained, but for its weights."""
    if measurement.loaded.encoder.reduction is None:
        raise UserError(
            "--teacher: nothing is reduced, so there is nothing to learn from the whole", hint="--reduction"
        )
    home = Path(folder.removeprefix("local-dir:"))
    if not (home / "config.json").is_file():
        raise UserError(f"--teacher {folder} is no exported model", hint="--teacher RUN/evaluation/finetune/export")
    check_timm_folder(home, "--teacher")
    teacher: Any = timm.create_model(f"local-dir:{home}", pretrained=True)
    own, other = ({name: part.shape for name, part in model.state_dict().items()} for model in (vit, teacher))
    if own != other or list(teacher.pretrained_cfg["mean"]) != list(measurement.loaded.mean):
        raise UserError(
            f"--teacher {folder} is another kind of model, or saw images in another way",
            hint="the same fine-tuning without --reduction, and its export",
        )
    return cast(VisionTransformer, teacher.eval().to(measurement.device))


def _some_images(measurement: Measurement, count: int = 64) -> Tensor:
    """Normalised images to learn from, ``(B, C, H, W)``, spread over all of them."""
    step = max(1, len(measurement.train) // count)
    framed = Framed(measurement.train, measurement.frames, range(0, len(measurement.train), step)[:count])
    images, _, _ = next(framed_batches(framed, count, num_workers=0))
    return images


def settings_of(measurement: Measurement, recipe: FinetuneRecipe) -> dict[str, Any]:
    """What the result is a function of."""
    subject = asdict(measurement.subject)
    names = ("weights", "data", "model", "img_size", "crop_pct", "val_fraction", "classes")
    settings = {name: subject[name] for name in names} | asdict(recipe)
    if (reduction := measurement.loaded.encoder.reduction) is not None:
        settings["reduction"] = reduction.describe()  # a file may say something else by the time training goes on
    return settings


def best_precision(device: torch.device) -> str:
    """bf16-mixed where a GPU has it."""
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"

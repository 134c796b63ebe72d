"""What every training with labels shares: it can be stopped between two steps and goes on to the same weights."""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from tqdm import tqdm

from mim.atomic import replaced
from mim.callbacks import Checkpoints, Signals
from mim.data.bad_files import BadFiles
from mim.data.finetune import FinetuneData
from mim.data.segmentation import SegmentationData
from mim.distributed.devices import best_precision
from mim.distributed.processes import process_rank
from mim.errors import DivergedError, StoppedError, UserError
from mim.methods import NonFiniteError
from mim.options.evaluation import TrainingOptions
from mim.run.checkpoint_files import AtomicCheckpointIO, checkpoint_step, newest_good
from mim.run.trainer import build_trainer
from mim.run.words import duration
from mim.terminal import watched
from mim.transfer.measurement import PRETRAINED

_QUIET = 30.0
"""Seconds between two lines of progress."""


class Progress(Callback):
    """Shows where a training stands: as a bar to those who watch, in a line every half minute elsewhere."""

    _bar: "tqdm[Any] | None" = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._first, self._started = trainer.global_step, time.monotonic()
        self._said, self._bar = self._started, None
        if trainer.is_global_zero and watched():
            self._bar = tqdm(
                total=trainer.max_steps, initial=self._first, unit="step", dynamic_ncols=True, leave=False, delay=0.5
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Prints a line if it is time; reading the loss waits for the device, so not more often."""
        now, step = time.monotonic(), trainer.global_step
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            return
        if now - self._said < _QUIET or not trainer.is_global_zero or step == self._first:
            return
        self._said = now
        left = (now - self._started) / (step - self._first) * (trainer.max_steps - step)
        loss = float(trainer.callback_metrics["train/loss"])
        print(f"    step {step:,}/{trainer.max_steps:,}  loss {loss:.4f}  eta {duration(left)}", flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def open_trainer(
    folder: Path,
    max_steps: int,
    save_every: int,
    options: TrainingOptions,
    device: torch.device,
    *,
    validate_every: int | None = None,
    bad_files: BadFiles | None = None,
) -> Trainer:
    """Lightning's trainer for a number of steps, with checkpoints in ``folder / "checkpoints"``.

    Args:
        folder: of this training.
        max_steps: optimizer steps.
        save_every: optimizer steps between two checkpoints.
        options: devices, micro-batches and precision.
        device: of this process; its kind is what is trained on.
        validate_every: optimizer steps between two looks at the scored images; none before the end unless given.
        bad_files: unreadable ones that this process meets; all processes judge them together.

    Raises:
        UserError: if there are no such devices.
    """
    cuda, signals = device.type == "cuda", Signals()
    settings = {
        "accelerator": "gpu" if cuda else "cpu",
        "devices": options.devices,
        "precision": best_precision(cuda) if options.precision == "auto" else options.precision,
        "accumulate_grad_batches": options.accumulate,
    }
    return build_trainer(
        settings,
        max_steps=max_steps,
        val_check_interval=validate_every * options.accumulate if validate_every else 1 << 30,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        sync_batchnorm=cuda,
        callbacks=[signals, Progress(), Checkpoints(folder / "checkpoints", save_every, signals, bad_files)],
        plugins=[AtomicCheckpointIO()],
    )


def fit(
    trainer: Trainer,
    module: LightningModule,
    data: FinetuneData | SegmentationData,
    folder: Path,
    resume: bool,
    hint: str,
) -> None:
    """Trains to the last step, from the newest whole checkpoint in ``folder`` if it is to go on.

    Args:
        trainer: from :func:`open_trainer`, with the same folder.
        module: is trained.
        data: its order is a function of the step.
        folder: of this training.
        resume: go on where it was stopped.
        hint: what to try if weights become NaN.

    Raises:
        StoppedError: after a signal.
        DivergedError: if the weights are no longer finite.
    """
    checkpoint = newest_good(folder / "checkpoints")[0] if resume else None
    data.first_step = checkpoint_step(checkpoint) if checkpoint else 0
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint and str(checkpoint), weights_only=True)
    except NonFiniteError as error:
        raise DivergedError(f"training failed: {error}", hint=hint) from error
    if trainer.global_step < trainer.max_steps:
        raise StoppedError


def train_all(
    root: Path,
    settings: Mapping[str, Any],
    encoders: Sequence[str],
    seeds: int,
    result: str,
    train: Callable[[str, int, Path], Any],
    resume: bool,
) -> dict[str, list[Any]]:
    """One training after another, each resumable where it was stopped; results that are there already are read.

    Args:
        root: folder of the evaluation.
        settings: what the results are a function of; a resumed training must be the same one.
        encoders: which ones, of :data:`PRETRAINED` and :data:`UNTRAINED`.
        seeds: trainings of each.
        result: file in the folder of a training that is written when it is finished.
        train: gives the result, as JSON knows it, from encoder, seed and folder.
        resume: go on where the same was stopped.

    Returns:
        The results by encoder, one per seed.

    Raises:
        StoppedError: after a signal.
        UserError: if something else was trained there.
    """
    first = process_rank() == 0
    if first:
        _remember(root, settings, resume)
    results: dict[str, list[Any]] = {}
    for seed in range(seeds):
        for who in encoders:
            folder = training_folder(root, who, seed)
            if resume and (folder / result).is_file():
                answer = json.loads((folder / result).read_text())
            else:
                folder.mkdir(parents=True, exist_ok=True)
                answer = train(who, seed, folder)
                if first:
                    _keep(folder, result, answer)
            results.setdefault(who, []).append(answer)
    if first:
        for picture in training_folder(root, PRETRAINED, 0).glob("*.png"):
            shutil.copy(picture, root)  # where the report looks for them
    return results


def _remember(folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Writes down what is being trained; a resumed training must be the same one.

    Raises:
        UserError: if it is another one.
    """
    file = folder / "settings.json"
    text = json.dumps(settings, indent=1, default=str)
    if resume and file.is_file():
        before, now = json.loads(file.read_text()), json.loads(text)
        # A setting that an earlier version did not have was off.
        differ = [name for name in now if before.get(name) != now[name] and (name in before or now[name])]
        changed = [f"{name} {before.get(name)} -> {now[name]}" for name in differ]
        if changed:
            raise UserError(
                f"--resume true: settings differ from those in {file}",
                why="; ".join(changed),
                hint="the settings as they were   or   --resume false   (starts over)",
            )
        return
    for old in folder.glob("*seed-*"):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def training_folder(root: Path, who: str, seed: int) -> Path:
    """Where the training of a pretrained or untrained encoder with one seed keeps what it needs to go on."""
    return root / f"{'' if who == PRETRAINED else 'scratch-'}seed-{seed}"


def _keep(folder: Path, name: str, result: object) -> None:
    """Writes a finished training's result into its folder, in place of its checkpoints."""
    with replaced(folder / name) as aside:  # a later call takes it as finished if it is there
        aside.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)

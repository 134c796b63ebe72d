"""Train a whole encoder with labels: ``python tools/finetune.py --weights runs/001-mae-photos --data photos``."""

import json
import sys
from typing import Literal

from mim.distributed.processes import INTERRUPTED, process_rank
from mim.errors import UserError
from mim.options.classification import FinetuneRecipe, Subject
from mim.options.ranges import Count, Positive, check_rising


def run(
    subject: Subject,
    recipe: FinetuneRecipe,
    seeds: Count = 1,
    from_scratch: bool = True,
    eval_every: Positive | None = None,
    devices: Count = 1,
    accumulate: Count = 1,
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto",
    resume: bool = False,
) -> None:
    """Accuracy after training the encoder and a classifier together, beside the same training from scratch.

    Args:
        subject: weights and images.
        recipe: how to train.
        seeds: repetitions, each with another order, crops and classifier.
        from_scratch: also train untrained encoders by the same recipe, which doubles the time.
        eval_every: epochs between looks at the scored images; 10 times over the training unless given.
        devices: to train on together.
        accumulate: micro-batches per step: same result, less memory.
        precision: auto is bf16-mixed on a GPU that has it.
        resume: go on where the same command was stopped, in the run that the weights belong to or in --out.
    """
    _check(recipe, devices * accumulate)
    # torch is imported when there is something to train: --help must not wait for it.
    from mim.report.confusion import save_confusion
    from mim.run.folder import quieten
    from mim.transfer.finetuning import Machine, best_precision, export, finish, settings_of, train
    from mim.transfer.measurement import TRAINED, UNTRAINED, Measurement, Scores, finish_section
    from mim.transfer.training import StoppedError, pictures_of_first, remember, training_folder

    rank = process_rank()
    quieten(rank)
    measurement = Measurement.open(subject, learning=True)
    kind = best_precision(measurement.device) if precision == "auto" else precision
    machine = Machine(devices, accumulate, kind, eval_every or recipe.epochs / 10)
    root = measurement.folder("finetune")
    if rank == 0:
        remember(root, settings_of(measurement, recipe), resume)
    scores: Scores = {"top-1": {}, "top-5": {}}
    exported = None
    for who in (TRAINED, UNTRAINED)[: 2 if from_scratch else 1]:
        for seed in range(seeds):
            folder = training_folder(root, who, seed)
            history = folder / "history.json"
            if not (resume and history.is_file()):
                encoder = measurement.reloaded() if who == TRAINED else measurement.untrained(seed)
                try:
                    module = train(measurement, encoder, recipe, machine, seed, folder, resume)
                except StoppedError:
                    print("stopped by a signal, saved; go on with  --resume true")
                    raise SystemExit(INTERRUPTED) from None
                if rank == 0:
                    finish(module, folder)
                    if who == TRAINED and seed == 0:
                        save_confusion(module.taken_for.numpy(), measurement.classes, folder / "confusion.png")
                        exported = root / "export"
                        export(module, measurement, exported, " ".join(["python", *sys.argv]))
            if rank == 0:
                last = json.loads(history.read_text())[-1]
                scores["top-1"].setdefault(who, []).append(last["top1"])
                scores["top-5"].setdefault(who, []).append(last["top5"])
    if rank == 0:
        protocol = f"{_protocol(recipe)}; {measurement.protocol()}; after the last epoch."
        pictures_of_first(root)
        measurement.write(root, "Fine-tuning", protocol, scores)
        finish_section(root)
        if exported is not None:
            print(f'  model   {exported}   (timm.create_model("local-dir:{exported}", pretrained=True))')


def _check(recipe: FinetuneRecipe, parts: int) -> None:
    """Refuses what could not work before anything heavy is imported."""
    check_rising("--anneal", recipe.anneal)
    check_rising("--scale", recipe.scale)
    if recipe.batch_size % parts or (recipe.batch_size // parts) % 2:
        near = max(2, round(recipe.batch_size / parts / 2) * 2) * parts
        raise UserError(
            f"--batch_size {recipe.batch_size} does not give {parts} equal parts of an even number of images",
            why="mixup mixes the images of a part in pairs",
            hint=f"--batch_size {near}",
        )


def _protocol(recipe: FinetuneRecipe) -> str:
    """How the encoder was trained, in words."""
    pool = "mean of patch tokens" if recipe.pool == "mean" else "class token"
    average = f", average of the weights {recipe.ema:g}" if recipe.ema else ""
    annealed = (
        f", reduction annealed over {recipe.anneal[0]:g} to {recipe.anneal[1]:g} of it" if any(recipe.anneal) else ""
    )
    return (
        f"all weights trained, {pool}, {recipe.epochs:g} epochs of batch {recipe.batch_size}, blr {recipe.blr:g}, "
        f"layer decay {recipe.layer_decay:g}, drop path {recipe.drop_path:g}, {recipe.auto_augment}, mixup "
        f"{recipe.mixup:g}, CutMix {recipe.cutmix:g}, smoothing {recipe.label_smoothing:g}, erasing {recipe.erase:g}"
        f"{average}{annealed}{', agreeing with a teacher without reduction' if recipe.teacher else ''}"
    )

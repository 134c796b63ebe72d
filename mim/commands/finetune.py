"""Train a whole encoder with labels: ``python tools/finetune.py --weights runs/001-mae-photos --data photos``."""

from pathlib import Path

from mim.errors import UserError
from mim.options.classification import ClassificationOptions, FinetuneRecipe
from mim.options.evaluation import Scores, TrainingOptions
from mim.options.ranges import Count, Positive, check_rising


def run(
    options: ClassificationOptions,
    recipe: FinetuneRecipe,
    training: TrainingOptions,
    seeds: Count = 1,
    from_scratch: bool = True,
    eval_every: Positive | None = None,
) -> Scores:
    """Accuracy after training the encoder and a classifier together, beside the same training from scratch.

    Args:
        options: weights and images.
        recipe: how to train.
        training: on what.
        seeds: repetitions, each with another order, crops and classifier.
        from_scratch: also train untrained encoders by the same recipe, which doubles the time.
        eval_every: epochs between looks at the scored images; 10 times over the training unless given.
    """
    _check(options, recipe, training)
    if recipe.memory is not None:
        _check_memory(options, recipe)
    # torch is imported when there is something to train: --help must not wait for it.
    from mim.transfer.finetuning import Finetuning
    from mim.transfer.memory import MemoryFinetuning

    kind = Finetuning if recipe.memory is None else MemoryFinetuning
    return kind(options, recipe, training, eval_every or recipe.epochs / 10).measure(seeds, from_scratch)


def _check(options: ClassificationOptions, recipe: FinetuneRecipe, training: TrainingOptions) -> None:
    """Refuses what could not work before anything heavy is imported."""
    if (
        options.out
        and Path(options.weights.removeprefix("local-dir:")).resolve() == Path(options.out, "export").resolve()
    ):
        raise UserError(
            f"--weights {options.weights} would be replaced by what is learned from them", hint=f"--out {options.out}-2"
        )
    check_rising("--anneal", recipe.anneal)
    check_rising("--scale", recipe.scale)
    if recipe.tlm and options.reduction is not None:
        raise UserError(f"--tlm {recipe.tlm:g} with --reduction {options.reduction}", hint="leave --reduction out")
    if training.devices == "auto":
        return
    parts = training.devices * training.accumulate
    if recipe.batch_size % parts or (recipe.batch_size // parts) % 2:
        near = max(2, round(recipe.batch_size / parts / 2) * 2) * parts
        raise UserError(
            f"--batch_size {recipe.batch_size} does not give {parts} equal parts of an even number of images",
            why="mixup mixes the images of a part in pairs",
            hint=f"--batch_size {near}",
        )


def _check_memory(options: ClassificationOptions, recipe: FinetuneRecipe) -> None:
    """Refuses settings of an encoder that learns, or changes, beside one that stands still."""
    memory = f"--memory {recipe.memory}"
    if recipe.pool == "mean":
        raise UserError(f"--pool mean: with {memory} the answer is read from a class token", hint="--pool cls")
    if options.reduction is not None:
        raise UserError(
            f"--reduction {options.reduction}: with {memory} all tokens are looked at", hint="leave --reduction out"
        )
    if unused := recipe.without_use:
        raise UserError(
            f"--{unused[0]}: with {memory} the encoder stands still, so it has no effect",
            hint=f"leave --{unused[0]} out",
        )

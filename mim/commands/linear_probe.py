"""Train a classifier on frozen features: ``python tools/linear_probe.py --weights runs/001-mae-photos``."""

from typing import Literal

from mim.errors import UserError
from mim.options.classification import ClassificationOptions, ProbeRecipe
from mim.options.evaluation import Scores
from mim.options.ranges import Count, Whole

_NAMES = {"linear": "Linear probe", "attentive": "Attentive probe", "multi_query": "Attentive probe, several queries"}


def run(
    options: ClassificationOptions,
    recipe: ProbeRecipe,
    layers: Count = 1,
    pool: Literal["cls", "mean", "both"] | None = None,
    crops: Whole = 0,
    seeds: Count = 3,
    export: bool = False,
) -> Scores:
    """Accuracy of a linear or attentive classifier over frozen features, beside untrained encoders.

    Args:
        options: weights and images.
        recipe: the classifier and its training.
        layers: last blocks whose features are put end to end, for a linear head.
        pool: class token, mean of the patch tokens, or both, for a linear head; what the run or the model pools by
            unless given.
        crops: random crops of every image to learn from, each kept on disk; an epoch takes the next one. As many as
            epochs is the papers' protocol, 0 takes the middle of the image in every epoch, which is far cheaper.
        seeds: repetitions, each with other initial weights, order, held-out part, and another untrained encoder.
        export: leave the encoder with the linear head of seed 0 as a classifier that timm opens.
    """
    if export:
        _check_export(options, recipe, layers, pool)
    if recipe.batch_size < 2:
        raise UserError("--batch_size 1: the head normalises over a batch", hint="--batch_size 256")
    # torch is imported when there is something to measure: --help must not wait for it.
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    from mim.evaluation.balance import balanced_accuracy, right_per_class
    from mim.evaluation.bank import Bank
    from mim.evaluation.features import Features
    from mim.evaluation.rate_selection import Outcome, probe_head
    from mim.report.confusion import save_confusion
    from mim.transfer.classification import Classification
    from mim.transfer.measurement import PRETRAINED, UNTRAINED, finish_section, share_out
    from mim.vit import distilled

    measurement = Classification(options)
    if export and distilled(measurement.loaded.encoder.vit):
        raise UserError(
            f"--export true: --weights {options.weights} has two classifiers, and a probe is one",
            hint="--export false",
        )
    linear = recipe.head == "linear"
    features = Features(layers, pool or measurement.loaded.pool) if linear else Features(pool="tokens")
    width = measurement.loaded.encoder.dim
    if recipe.head == "multi_query" and width % recipe.queries:
        fitting = max(number for number in range(1, recipe.queries) if width % number == 0)
        raise UserError(
            f"--queries {recipe.queries}: queries must divide the width {width} of the encoder",
            hint=f"--queries {fitting}",
        )
    classes = len(measurement.classes)
    trained = measurement.banks(measurement.loaded.encoder, features, crops)
    trainings = []
    for seed in range(seeds):
        untrained = measurement.banks(measurement.untrained(seed), features, crops)
        trainings += [(PRETRAINED, seed, *trained), (UNTRAINED, seed, *untrained)]

    def train(job: tuple[str, int, list[Bank], Bank]) -> Outcome:
        _, seed, banks, queries = job
        return probe_head(banks, queries, recipe, classes, seed, measurement.device)

    outcomes = share_out(trainings, train)
    scores: Scores = {"top-1": {}, "top-5": {}}
    rates: dict[str, list[float]] = {PRETRAINED: [], UNTRAINED: []}
    for (who, *_), outcome in zip(trainings, outcomes, strict=True):
        scores["top-1"].setdefault(who, []).append(outcome.top1)
        scores["top-5"].setdefault(who, []).append(outcome.top5)
        if measurement.uneven:
            balanced = balanced_accuracy(outcome.answers, trained[1].labels)
            scores.setdefault("balanced accuracy", {}).setdefault(who, []).append(balanced)
        rates[who].append(outcome.lr)
    if measurement.is_main_process:
        protocol = f"frozen encoder, {features.describe()}, {measurement.protocol()}; {_protocol(recipe, crops)}"
        details = {f"learning rate, {who}": ", ".join(f"{lr:g}" for lr in used) for who, used in rates.items()}
        right = right_per_class(outcomes[0].answers, trained[1].labels, measurement.classes)
        details |= measurement.class_sizes({"seed 0": right})
        folder = measurement.folder(recipe.head)
        measurement.write(folder, _NAMES[recipe.head], protocol, scores, features.pool, details)
        matrix = multiclass_confusion_matrix(outcomes[0].answers, trained[1].labels, num_classes=classes)
        save_confusion(matrix.numpy(), measurement.classes, folder / "confusion.png")
        finish_section(folder)
        if export:
            from mim.transfer.probed import export_probe

            assert outcomes[0].layer is not None
            home = export_probe(measurement, features, outcomes[0].layer, folder / "export")
            print(f'  model   {home}   (timm.create_model("local-dir:{home}", pretrained=True))')
    return scores


def _check_export(
    options: ClassificationOptions, recipe: ProbeRecipe, layers: int, pool: Literal["cls", "mean", "both"] | None
) -> None:
    """Refuses what timm's models have no place for."""
    others = {
        f"--head {recipe.head}": recipe.head != "linear",
        f"--layers {layers}": layers > 1,
        "--pool both": pool == "both",
        f"--reduction {options.reduction}": options.reduction is not None,
    }
    if asked := [option for option, given in others.items() if given]:
        why = "one linear layer behind the pooling of a whole timm model is all that an export can hold"
        raise UserError(f"--export true with {asked[0]}", why=why, hint="--export false")


def _protocol(recipe: ProbeRecipe, crops: int) -> str:
    """How the classifier was trained and chosen, in words."""
    optimizer = recipe.optimizer.upper() if recipe.head == "linear" else "AdamW"
    norm = "batch norm without affine, " if recipe.norm == "batch" or recipe.head != "linear" else ""
    shown = f"{crops} random crops of each image in turn" if crops else "centre crops, not augmented"
    chosen = {
        "held_out": "the best chosen on a tenth of the images to learn from, then trained again on all of them",
        "on_test": "the best of them and of all epochs CHOSEN ON THE REPORTED IMAGES, which reads too high",
    }[recipe.select]
    rates = (
        f"{len(recipe.rates)} learning rates, {chosen}"
        if len(recipe.rates) > 1
        else f"learning rate {recipe.rates[0]:g}"
    )
    return f"{norm}{optimizer}, {recipe.epochs} epochs of batch {recipe.batch_size}, {shown}; {rates}."

"""Accuracy over speed of token reductions that need no training: ``python tools/pareto.py --weights runs/small``."""

from typing import Literal

from mim.errors import UserError
from mim.options.classification import ClassificationOptions
from mim.options.ranges import Count, Processes, Threads
from mim.options.shares import parse_shares


def run(
    weights: str,
    data: str = "builtin",
    masks: str | None = None,
    pool: Literal["cls", "mean"] | None = None,
    reduction: str = "all",
    shares: str = "0.75,0.5",
    model: str | None = None,
    img_size: Count | None = None,
    batch_size: Count = 8,
    rounds: Count = 10,
    threads: Threads | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    num_workers: Processes | None = None,
    trust: bool = False,
    out: str | None = None,
) -> None:
    """Score and time every token reduction that needs no training at several rates, and draw accuracy over speed.

    Args:
        weights: run folder, timm folder, checkpoint file or timm name.
        data: labelled images as for knn; 20-NN accuracy is scored on them.
        masks: images with masks as for segment; the mIoU of a k-NN head is scored, too.
        pool: of the 20-NN: class token or mean of the patch tokens; what the run or the model pools by unless given.
        reduction: names with commas, or 'all' that need no training.
        shares: of the model's multiply-adds that each reduction is set to, with commas.
        model: timm name of the model that a checkpoint file belongs to, if its shapes do not tell.
        img_size: pixels per side instead of the model's own; positions are resized.
        batch_size: images of a timed forward pass, which are noise.
        rounds: turns of each, after two that are not counted.
        threads: processor threads; all unless given.
        device: where to compute; auto takes a GPU if there is one.
        num_workers: loader processes; one per core unless given.
        trust: load a checkpoint file although it can run code.
        out: folder for the page; inside the run that the weights belong to unless given.
    """
    parts = parse_shares(shares)
    from mim.benchmark.pareto import protocol, sweep
    from mim.benchmark.pareto_page import write
    from mim.benchmark.results import prepare
    from mim.evaluation.features import Features
    from mim.reduction.recipes import RECIPES, recipe
    from mim.run.folder import evaluation_folder
    from mim.transfer.classification import Classification

    prepare(device, threads)
    free = [name for name, known in RECIPES.items() if not known.trained]
    wanted = free if reduction == "all" else reduction.split(",")
    for name in wanted:
        if recipe(name).trained:
            hint = f"--reduction {','.join(free)}"
            raise UserError(f"--reduction {name}: its scores are random until they are trained", hint=hint)
    options = ClassificationOptions(weights, data, model, num_workers, device, out=out, trust=trust, img_size=img_size)
    measurement = Classification(options)
    features = Features(pool=pool or measurement.loaded.pool)
    points = sweep(measurement, features, masks, wanted, parts, batch_size, rounds)
    words = protocol(points, options, features, masks, batch_size, rounds)
    facts = {"weights": weights, "data": data, "masks": masks, "pool": features.pool}
    write(points, evaluation_folder(weights, out, "pareto"), words, facts)

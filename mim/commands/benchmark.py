"""Measure what a training step costs: ``python tools/benchmark.py --config FILE --against plain``."""

import json as jsonlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from mim.cli import CONFIGS, translate
from mim.errors import UserError
from mim.outputs import check_file
from mim.ranges import Count, Processes, Threads
from mim.subject import Subject

if TYPE_CHECKING:
    import torch
    from jsonargparse import Namespace

    from mim.benchmark import Contender, Timing

PHASES = ("forward", "backward", "optimizer", "step")


def run(
    config: Path = CONFIGS / "mae" / "default.yaml",
    against: str | None = None,
    model: str | None = None,
    img_size: Count | None = None,
    batch_size: Count = 8,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto",
    compile: bool = False,
    threads: Threads | None = None,
    rounds: Count = 10,
    data: str | None = None,
    num_workers: Processes | None = None,
    json: Path | None = None,
    reduction: str | None = None,
    shares: str = "0.75,0.5",
    weights: str | None = None,
    masks: str | None = None,
    finetuned: Path | None = None,
    out: str | None = None,
) -> None:
    """Measure speed and memory of a training step and of the loader, or of token reductions at inference.

    Args:
        config: the recipe to measure.
        against: a second recipe that takes turns with the first, or 'plain': the same method without our shortcuts.
        model: any timm Vision Transformer instead of the recipe's.
        img_size: pixels per side instead of the recipe's.
        batch_size: images per step.
        device: where to compute; auto takes a GPU if there is one.
        precision: of the step; auto is bf16-mixed on a GPU that has it.
        compile: compile the transformer blocks; the plain formulation never is.
        threads: processor threads; all unless given.
        rounds: turns of each recipe, after two that are not counted.
        data: images as for pretraining; measures the loader alone, and loader and step together.
        num_workers: loader processes; one per core unless given.
        json: write every number to this file.
        reduction: token reductions to measure at inference instead of a training step: names with commas, or 'all'.
        shares: of the model's multiply-adds that each reduction is set to, with commas.
        weights: trained weights; draws accuracy over speed for every reduction that needs no training, 20-NN on --data.
        masks: images with masks, as builtin; draws the mIoU of a k-NN head, too.
        finetuned: a run, or a folder of results, in which an encoder was fine-tuned with and without reductions; draws
            what they have reached over the speed of what they exported.
        out: folder for accuracy over speed; inside the run that the weights belong to unless given.
    """
    parts = _shares(shares)
    if json:
        check_file("--json", json)
    for variable, level in (("KINETO_LOG_LEVEL", "99"), ("TORCH_CPP_LOG_LEVEL", "ERROR")):
        os.environ.setdefault(variable, level)  # the profiler, asked for memory, talks about much else
    import torch

    from mim.benchmark import Contender, MatrixPeak, build, compare, compile_blocks, loader_rates, ratios

    if threads:
        torch.set_num_threads(threads)
    place = _device(device)
    bf16 = place.type == "cuda" and torch.cuda.is_bf16_supported()
    precision = ("bf16-mixed" if bf16 else "32-true") if precision == "auto" else precision
    if finetuned is not None:
        _finetuned(finetuned, out, place, batch_size, rounds)
        return
    if weights is not None:
        subject = Subject(weights, data or "builtin", model, img_size, num_workers=num_workers, device=device, out=out)
        _pareto(subject, masks, reduction or "all", parts, batch_size, rounds)
        return
    if reduction:
        model = model or "vit_base_patch16_224"
        rows = _reductions(model, img_size, reduction, parts, batch_size, place, precision, rounds)
        _write(json, {"model": model, "batch_size": batch_size, "threads": torch.get_num_threads(), "rows": rows})
        return
    overrides = {"batch_size": batch_size, "model": model, "img_size": img_size, "data": data}
    overrides |= {"num_workers": num_workers}
    recipe = _parse(config, overrides)
    contenders = [Contender(_name(config), *build(recipe, place), precision)]
    if against == "plain":
        contenders.append(Contender.plain(*build(recipe, place), precision))
    elif against:
        contenders.append(Contender(_name(Path(against)), *build(_parse(Path(against), overrides), place), precision))
    if compile:
        for contender in contenders:
            if contender.name != "plain":
                compile_blocks(contender.method)

    encoder = contenders[0].method.encoder
    peak = MatrixPeak(place, precision, batch_size * encoder.grid[0] * encoder.grid[1], encoder.dim)
    peak.measure()
    timings = compare(contenders, rounds, peak.measure)
    results: dict[str, Any] = {
        "setting": {
            "device": torch.cuda.get_device_name() if place.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "precision": precision,
            "compile": compile,
            "batch_size": batch_size,
            "img_size": encoder.img_size,
            "rounds": rounds,
        },
        "peak": {"flop_per_second": peak.rate, "shape": peak.shape},
        "steps": [_summary(c, t, batch_size, peak.rate) for c, t in zip(contenders, timings, strict=True)],
    }
    if against:
        results["ratio"] = ratios(*timings)
    if data:
        results["loader"] = loader_rates(recipe, contenders[0], rounds)
    _print(results)
    _write(json, results)


def _write(path: Path | None, results: Mapping[str, Any]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(jsonlib.dumps(results, indent=2) + "\n")
        print(f"  json     {path}")


def _reductions(
    model: str,
    img_size: int | None,
    names: str,
    shares: list[float],
    batch_size: int,
    place: "torch.device",
    precision: str,
    rounds: int,
) -> list[dict[str, Any]]:
    """Measures token reductions on noise and prints a row for each."""
    import timm
    import torch

    from mim.benchmark_reduction import contenders, measure, table
    from mim.reduction.recipes import RECIPES

    wanted = [name for name, recipe in RECIPES.items() if recipe.shortens] if names == "all" else names.split(",")
    torch.manual_seed(0)
    sized: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    vit: Any = timm.create_model(model, **sized)
    size = vit.patch_embed.img_size
    images = torch.randn(batch_size, vit.patch_embed.proj.in_channels, *size, device=place)
    try:
        models = contenders(vit, wanted, shares, images, precision)
    except TypeError as error:
        raise UserError(f"--model {model}: {error}", hint="--model vit_base_patch16_224") from error
    rows = measure(models, rounds)
    where = f"{place.type}, {torch.get_num_threads()} threads, {precision}"
    print(f"{model}, batch {batch_size} at {size[0]}x{size[1]}, {where}; {rounds} rounds\n")
    print(table(rows))
    print("\n  GMAC     multiply-adds per image by formula; counted: by torch while the model runs")
    print("  speed    over the whole model in the same round: median; fastest steps; processor time")
    print("  of MACs  speed over what the saved multiply-adds promise")
    return rows


def _pareto(subject: Subject, masks: str | None, names: str, shares: list[float], batch_size: int, rounds: int) -> None:
    """Scores and times every reduction that needs no training, and writes the page."""
    from mim.pareto import protocol, sweep
    from mim.pareto_page import write
    from mim.reduction.recipes import RECIPES, recipe
    from mim.run import evaluation_folder

    free = [name for name, known in RECIPES.items() if not known.trained]
    wanted = free if names == "all" else names.split(",")
    for name in wanted:
        if recipe(name).trained:
            hint = f"--reduction {','.join(free)}"
            raise UserError(f"--reduction {name}: its scores are random until they are trained", hint=hint)
    points = sweep(subject, masks, wanted, shares, batch_size, rounds)
    words = protocol(points, subject, masks, batch_size, rounds)
    facts = {"weights": subject.weights, "data": subject.data, "masks": masks}
    write(points, evaluation_folder(subject.weights, subject.out, "pareto"), words, facts)


def _finetuned(home: Path, out: str | None, place: "torch.device", batch_size: int, rounds: int) -> None:
    """Times what fine-tunings have exported, and writes the page."""
    from mim.pareto_finetuned import collect
    from mim.pareto_page import write
    from mim.run import evaluation_folder

    points, words = collect(home, place, batch_size, rounds)
    write(points, evaluation_folder(str(home), out, "pareto-finetuned"), words, {"finetuned": str(home)})


def _shares(text: str) -> list[float]:
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        raise UserError(f"--shares {text}: these are not numbers", hint="--shares 0.75,0.5") from None
    if not all(0 < share <= 1 for share in shares):
        raise UserError(f"--shares {text}: each is above 0, up to 1", hint="--shares 0.75,0.5")
    return shares


def _device(name: str) -> "torch.device":
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here", hint="--device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _name(config: Path) -> str:
    return f"{config.parent.name}/{config.stem}"


def _parse(config: Path, overrides: Mapping[str, object]) -> "Namespace":
    from mim.config import parse

    if not config.is_file():
        raise UserError(f"{config} is not a file", hint="python tools/info.py configs")
    given = [f"--{name}={value}" for name, value in overrides.items() if value is not None]
    return parse(translate([f"--config={config}", *given]))


def _summary(contender: "Contender", timings: "list[Timing]", images: int, peak: float) -> dict[str, Any]:
    times = {phase: median(getattr(timing, phase) for timing in timings) for phase in PHASES}
    fastest = min(timing.step for timing in timings)
    flops = contender.flops()
    return {
        "name": contender.name,
        "method": type(contender.method).__name__,
        "seconds": times | {"fastest": fastest, "processor": median(timing.processor for timing in timings)},
        "images_per_second": images / times["step"],
        "flop": flops,
        "flop_per_second": {"median": flops / times["step"], "fastest": flops / fastest},
        "share_of_peak": {"median": flops / times["step"] / peak, "fastest": flops / fastest / peak},
        "memory_bytes": contender.memory(),
        "timings": [asdict(timing) for timing in timings],
    }


def _print(results: Mapping[str, Any]) -> None:
    setting, peak = results["setting"], results["peak"]
    size = "x".join(map(str, setting["img_size"]))
    where = f"{setting['device']}, {setting['threads']} threads, {setting['precision']}, torch {setting['torch']}"
    print(f"batch {setting['batch_size']} at {size}, {where}; median of {setting['rounds']} rounds\n")
    head = (
        "forward",
        "backward",
        "optimizer",
        "step",
        "fastest",
        "cpu time",
        "img/s",
        "GFLOP",
        "GFLOP/s",
        "peak",
        "GiB",
    )
    print(f"  {'seconds':<28}" + "".join(f"{title:>10}" for title in head))
    for step in results["steps"]:
        seconds = step["seconds"]
        cells = [f"{seconds[phase]:.4f}" for phase in (*PHASES, "fastest", "processor")]
        cells += [f"{step['images_per_second']:.1f}", f"{step['flop'] / 1e9:.1f}"]
        cells += [f"{step['flop_per_second']['median'] / 1e9:.1f}", f"{step['share_of_peak']['median']:.0%}"]
        cells += [f"{step['memory_bytes'] / 2**30:.2f}"]
        print(f"  {step['name']:<28}" + "".join(f"{cell:>10}" for cell in cells))
    shape = " x ".join(map(str, peak["shape"]))
    print(f"\n  peak     {peak['flop_per_second'] / 1e9:.1f} GFLOP/s in this run, matrix product {shape}")
    print("  GFLOP    of the matrix products, forward and backward; a multiply-add is 2 FLOP")
    print("  GiB      most that a step holds beyond weights and optimizer state")
    if "ratio" in results:
        ratio, names = results["ratio"], [step["name"] for step in results["steps"]]
        kinds = f"median {ratio['median']:.2f}, fastest step {ratio['fastest']:.2f}, cpu time {ratio['processor']:.2f}"
        print(f"  speed    {names[0]} over {names[1]}: {kinds}")
    if "loader" in results:
        loader, alone = results["loader"], results["steps"][0]["images_per_second"]
        print(
            f"  loader   {loader['alone']:.1f} img/s alone with {loader['workers']} workers, step {alone:.1f} img/s "
            f"alone, together {loader['together']:.1f} img/s\n           CPU ms an image: "
            + ", ".join(f"{stage} {taken:.2f}" for stage, taken in loader["milliseconds"].items())
        )

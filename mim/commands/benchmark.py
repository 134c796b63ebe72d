"""Measure what a training step costs: ``python tools/benchmark.py --config FILE --against plain``."""

from collections.abc import Mapping
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from mim.errors import UserError
from mim.options.outputs import check_file
from mim.options.pretraining import translate
from mim.options.ranges import Count, Processes, Threads
from mim.options.recipes import recipe_file

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from mim.benchmark.training import Contender, Timing

PHASES = ("forward", "backward", "optimizer", "step")


def run(
    config: str = "mae/default",
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
    gpu_report: bool = False,
) -> None:
    """Measure speed and memory of a training step and of the loader.

    Args:
        config: the recipe to measure, by its name or file.
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
        num_workers: loader processes of --data; one per core unless given.
        json: write every number to this file.
        gpu_report: measure all that a GPU has to show in under 8 minutes, and write it as JSON and as a table; of the
            other options it takes --device, --precision, --threads, --num_workers, --json, and --data for its training.
    """
    if gpu_report:
        mine = (config, against, model, img_size, batch_size, compile, rounds)
        _report(mine, device, precision, threads, data, num_workers, json)
        return
    if num_workers is not None and data is None:
        raise UserError("--num_workers: there is no loader to measure without images", hint="--data builtin")
    if json:
        check_file("--json", json)
    import torch

    from mim.benchmark.results import prepare, write_json
    from mim.benchmark.training import Contender, MatrixPeak, build, compare, loader_rates, ratios
    from mim.distributed.devices import best_precision
    from mim.vit import compile_blocks

    place = prepare(device, threads)
    kind = best_precision(place.type == "cuda") if precision == "auto" else precision
    overrides = {"batch_size": batch_size, "model": model, "img_size": img_size, "data": data}
    overrides |= {"num_workers": num_workers}
    recipe = _parse(config, overrides)
    contenders = [Contender(_name(config), *build(recipe, place), kind)]
    if against == "plain":
        contenders.append(Contender.plain(*build(recipe, place), kind))
    elif against:
        contenders.append(Contender(_name(against), *build(_parse(against, overrides), place), kind))
    if compile:
        for contender in contenders:
            if contender.name != "plain":
                compile_blocks(contender.method)

    encoder = contenders[0].method.encoder
    peak = MatrixPeak(place, kind, batch_size * encoder.grid[0] * encoder.grid[1], encoder.dim)
    peak.measure()
    timings = compare(contenders, rounds, peak.measure)
    results: dict[str, Any] = {
        "setting": {
            "device": torch.cuda.get_device_name() if place.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "precision": kind,
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
    write_json(json, results)


def _report(
    others: tuple[object, ...],
    device: str,
    precision: str,
    threads: int | None,
    data: str | None,
    num_workers: int | None,
    json: Path | None,
) -> None:
    """``--gpu_report``."""
    for name, given in zip(
        ("config", "against", "model", "img_size", "batch_size", "compile", "rounds"), others, strict=True
    ):
        if given != signature(run).parameters[name].default:
            raise UserError(f"--{name}: --gpu_report has recipes and sizes of its own", hint="--gpu_report")
    table = json or Path("gpu_report.json")
    check_file("--json", table)
    import torch

    from mim.benchmark.gpu_report import gpu_report
    from mim.benchmark.results import prepare
    from mim.distributed.devices import best_precision

    place = prepare(device, threads)
    kind = best_precision(place.type == "cuda") if precision == "auto" else precision
    gpu_report(place, kind, table, data, num_workers, torch.get_num_threads())


def _name(config: str | Path) -> str:
    file = recipe_file(config)
    return f"{file.parent.name}/{file.stem}"


def _parse(config: str | Path, overrides: Mapping[str, object]) -> "Namespace":
    from mim.run.config import parse

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
            + "\n           img/s by workers: "
            + ", ".join(f"{workers} {rate:.0f}" for workers, rate in loader["by_workers"].items())
            + f"; a core that only decodes: {loader['decode_bound']:.0f}"
        )

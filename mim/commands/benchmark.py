"""Measure what a training step costs: ``python tools/benchmark.py --config configs/mae/default.yaml --against plain``."""

import json as jsonlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from mim.cli import CONFIGS, translate
from mim.errors import UserError

if TYPE_CHECKING:
    import torch
    from jsonargparse import Namespace

    from mim.benchmark import Contender, Timing
    from mim.methods import Batch

PHASES = ("forward", "backward", "optimizer", "step")


def run(
    config: Path = CONFIGS / "mae" / "default.yaml",
    against: str | None = None,
    model: str | None = None,
    img_size: int | None = None,
    batch_size: int = 8,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto",
    compile: bool = False,
    threads: int | None = None,
    rounds: int = 10,
    data: str | None = None,
    num_workers: int | None = None,
    json: Path | None = None,
) -> None:
    """Measure speed and memory of a training step and of the loader.

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
    """
    import torch

    from mim.benchmark import MatrixPeak, compare, ratios

    if threads:
        torch.set_num_threads(threads)
    place = _device(device)
    bf16 = place.type == "cuda" and torch.cuda.is_bf16_supported()
    precision = ("bf16-mixed" if bf16 else "32-true") if precision == "auto" else precision
    overrides = {"batch_size": batch_size, "model": model, "img_size": img_size, "data": data}
    overrides |= {"num_workers": num_workers}
    parsed = _parse(config, overrides)
    contenders = [_contender(_name(config), parsed, place, precision, compile)]
    if against == "plain":
        contenders.append(_plain(parsed, place, precision))
    elif against:
        contenders.append(_contender(_name(Path(against)), _parse(Path(against), overrides), place, precision, compile))

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
        results["loader"] = _loader(parsed, contenders[0], rounds)
    _print(results)
    if json:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(jsonlib.dumps(results, indent=2) + "\n")
        print(f"  json     {json}")


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


def _contender(
    name: str, config: "Namespace", device: "torch.device", precision: str, compile: bool = False
) -> "Contender":
    from timm.models.vision_transformer import Block

    from mim.benchmark import Contender

    method, batch = _build(config, device)
    if compile:
        for module in method.modules():
            if isinstance(module, Block):
                module.compile()
    return Contender(name, method, batch, precision)


def _plain(config: "Namespace", device: "torch.device", precision: str) -> "Contender":
    from mim.benchmark import PLAIN_LOSSES, Contender

    method, batch = _build(config, device)
    if type(method) not in PLAIN_LOSSES:
        known = ", ".join(method.__name__ for method in PLAIN_LOSSES)
        raise UserError(
            f"--against plain: {type(method).__name__} has no plain formulation",
            why=f"there is one for {known}",
            hint="--against OTHER.yaml",
        )
    return Contender.plain(method, batch, precision)


def _build(config: "Namespace", device: "torch.device") -> "tuple[Any, Batch]":
    """The method, and a batch of noise that went through the recipe's views, on the device."""
    import torch

    from mim.config import build_parser
    from mim.data.pretrain import collate

    torch.manual_seed(config.seed)
    try:
        objects = build_parser().instantiate_classes(config)
    except (ValueError, TypeError) as error:
        raise UserError(str(error), hint="--config FILE names a recipe that pretraining takes") from error
    method, data = objects.model.to(device), objects.data
    encoder = method.encoder
    data.views.configure(encoder.img_size, *data.statistics(encoder.in_chans))
    noise = torch.randint(256, (data.batch_size, encoder.in_chans, *encoder.img_size), dtype=torch.uint8)
    views, labels, _ = collate([(data.views.crop(image), -1, []) for image in noise])
    return method, (data.views.to(device)([view.to(device) for view in views]), labels.to(device))


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


def _loader(config: "Namespace", contender: "Contender", steps: int) -> dict[str, Any]:
    """Images per second that the loader delivers to an idle device, and to one that trains on them."""
    import time

    from torch.utils.data import DataLoader

    from mim.config import build_parser
    from mim.data.pretrain import Crops, collate

    data, device, encoder = build_parser().instantiate_classes(config).data, contender.method.device, None
    encoder = contender.method.encoder
    data.open(encoder.img_size, encoder.in_chans, config.seed)
    data.check()
    workers = data.num_workers
    warm_up = max(2, 2 * workers)  # batches that workers prepare ahead, while the first ones start

    def batches() -> Iterator["Batch"]:
        loader = DataLoader(
            Crops(data.source, data.views.cpu(), config.seed),
            batch_sampler=data.sampler(range(warm_up + steps)),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
        )
        for batch in loader:
            views, labels = data.on_before_batch_transfer(batch, 0)
            moved = [view.to(device, non_blocking=True) for view in views], labels.to(device)
            yield data.on_after_batch_transfer(moved, 0)

    def rate(consume: Any) -> float:  # noqa: ANN401
        start = 0.0
        for number, batch in zip(count(), batches(), strict=False):
            if number == warm_up:
                start = time.perf_counter()
            consume(batch)
        return data.batch_size * steps / (time.perf_counter() - start)

    return {"workers": workers, "alone": rate(lambda batch: None), "together": rate(contender.step)}

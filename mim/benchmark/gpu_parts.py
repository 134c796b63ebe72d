"""What a report of a GPU is made of: each part yields rows as it measures them.

Without a GPU the parts run at toy size, so that whatever is wrong with them is found before a GPU is there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import Namespace
from PIL import Image

from mim.benchmark.training import Contender, MatrixPeak, build, compare, loader_rates, noise
from mim.distributed.devices import send
from mim.methods import Method
from mim.options.pretraining import translate
from mim.randomness import RowGenerator
from mim.run.config import instantiate, parse
from mim.vit import compile_blocks

Row = dict[str, Any]

PHOTOS = Path(__file__).parents[1] / "data" / "photos"

_ENCODER = "--model.init_args.encoder."
_TOY = [f"{_ENCODER}img_size=32", f"{_ENCODER}kwargs={{embed_dim: 32, depth: 2, num_heads: 2}}"]


class NotHereError(Exception):
    """A part has nothing to measure on this machine."""


@dataclass(frozen=True)
class Recipe:
    """What a training step is measured of.

    Args:
        config: its recipe.
        images: per step.
        options: on top of the recipe.
    """

    config: str
    images: int
    options: tuple[str, ...] = ()

    def parsed(self, **changes: object) -> Namespace:
        """The settings with other images per step or other data."""
        given = {"batch_size": self.images, "num_workers": 0} | changes
        options = [f"--{name}={value}" for name, value in given.items()]
        return parse(translate([f"--config={self.config}", *self.options, *options]))


FULL = {
    "MAE ViT-S": Recipe("mae/vit_small_patch16_224", 512),
    "MAE ViT-B": Recipe("mae/vit_base_patch16_224", 256),
    "MAE ViT-L": Recipe("mae/vit_large_patch16_224", 256),
    "iBOT ViT-S": Recipe("ibot/vit_small_patch16_224", 64),
    "AttMask ViT-S": Recipe("attmask/vit_small_patch16_224", 64),
    "HPM ViT-B": Recipe("hpm/vit_base_patch16_224", 128),
}
TOY = {
    "MAE toy": Recipe("mae/demo", 4, tuple(_TOY)),
    "iBOT toy": Recipe("ibot/demo", 2, tuple(_TOY)),
}


@dataclass(frozen=True)
class Bench:
    """Where and at which size the parts measure.

    Args:
        device: to measure on.
        precision: ``32-true`` or ``bf16-mixed``.
        folder: for what they write and throw away.
        peak: the matrix peak, measured by :func:`matrix_peak`.
        data: labelled images for the training; generated ones if not given.
        workers: loader processes.
        seconds: of the training.
    """

    device: torch.device
    precision: str
    folder: Path
    peak: MatrixPeak
    data: str | None
    workers: int
    seconds: float

    @property
    def toy(self) -> bool:
        """Whether there is no GPU."""
        return self.device.type != "cuda"

    @property
    def recipes(self) -> dict[str, Recipe]:
        """What is measured, by its name in tables."""
        return TOY if self.toy else FULL

    @property
    def accelerator(self) -> str:
        """As ``pretrain`` calls the device."""
        return "--trainer.accelerator=" + ("cpu" if self.toy else "gpu")


def matrix_peak(bench: Bench) -> Iterator[Row]:
    """The best matrix product, which shares of the peak refer to."""
    bench.peak.measure()
    yield {"TFLOP/s": bench.peak.rate / 1e12, "shape": " x ".join(map(str, bench.peak.shape))}


def gpu_tests(bench: Bench) -> Iterator[Row]:
    """Tests marked ``gpu``; in a checkout alone."""
    tests = Path(__file__).parents[2] / "tests" / "gpu"
    if not tests.is_dir():
        raise NotHereError("the tests are in a checkout, not in an installation")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", str(tests)]
    done = _ran(command, cwd=tests.parents[1], accepted=(0, 1))
    yield {"result": done.strip().splitlines()[-1].strip("= ")}
    if failed := re.findall(r"^FAILED (\S+)", done, re.MULTILINE):
        raise RuntimeError("failed: " + ", ".join(failed))


def step(bench: Bench, name: str) -> Iterator[Row]:
    """Throughput, share of the peak and memory of a recipe's step, as it is and with compiled blocks.

    The share of a step in which the CPU hands out work tells what a CUDA graph could save: where it is near 1, the
    device waits for the CPU.
    """
    recipe = bench.recipes[name]
    contender = Contender(name, *build(recipe.parsed(), bench.device), bench.precision)
    contender.step()
    flops, memory = contender.flops(), contender.memory()
    for compiled in (False, True):
        if compiled:
            compile_blocks(contender.method)
        (timings,) = compare([contender], 2 if bench.toy else 10, lambda: None)
        seconds = median(timing.step for timing in timings)
        busy = _issuing_share(contender)
        yield {
            "compile": compiled,
            "images": recipe.images,
            "ms": 1000 * seconds,
            "img/s": recipe.images / seconds,
            "MFU": flops / seconds / bench.peak.rate,
            "GiB": memory / 2**30,
            "CPU share": busy,
            "CUDA graph": "candidate" if busy > 0.9 and not bench.toy else "",
        }
        memory = memory if bench.toy else contender.memory()


def _issuing_share(contender: Contender, steps: int = 3) -> float:
    """Share of the time of some steps that passes until the last of them has been handed to the device."""
    _synchronize(contender.method.device)
    start = time.perf_counter()
    for _ in range(steps):
        contender.issue(contender.batch)
    issued = time.perf_counter() - start
    _synchronize(contender.method.device)
    return issued / (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def cuda_graph(bench: Bench) -> Iterator[Row]:
    """Blocks of the smallest encoder, as a teacher runs them, launched one by one and as a captured graph."""
    if bench.toy:
        raise NotHereError("CUDA graphs need a GPU")
    name, recipe = next(iter(bench.recipes.items()))
    method, _ = build(recipe.parsed(batch_size=8), bench.device)
    for images in (8, recipe.images):
        tokens = torch.randn(images, 50, method.encoder.dim, device=bench.device)
        eager, graphed = _graphed(method, tokens)
        yield {
            "blocks of": name,
            "images": images,
            "launched ms": eager,
            "graph ms": graphed,
            "speed-up": eager / graphed,
        }


def _graphed(method: Method, tokens: torch.Tensor) -> tuple[float, float]:
    """Milliseconds of all blocks without and with a graph."""

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            method.encoder.vit.blocks(tokens)

    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    times = []
    for run in (forward, graph.replay):
        _synchronize(tokens.device)
        start = time.perf_counter()
        for _ in range(20):
            run()
        _synchronize(tokens.device)
        times.append(1000 * (time.perf_counter() - start) / 20)
    return times[0], times[1]


def waiting(bench: Bench, steps: int = 20) -> Iterator[Row]:
    """Steps from pinned views to the teacher, in which whatever waits for the GPU is an error."""
    for name, recipe in bench.recipes.items():
        config = recipe.parsed(batch_size=2 if bench.toy else 16)
        torch.manual_seed(config.seed)
        objects = instantiate(config)
        data, method = objects.data, objects.model.to(bench.device)
        views, labels, keys = noise(data, method)
        data.views.to(bench.device)
        contender = Contender(name, method, (views, labels), bench.precision)
        taken, failure = 0, ""
        try:
            for taken in range(1, steps + 1):
                if taken == 3 and not bench.toy:  # the first steps may: libraries start
                    torch.cuda.set_sync_debug_mode("error")
                moved = [send(view, bench.device) for view in views]
                batch = data.views(moved, RowGenerator(keys)), send(labels, bench.device)
                method.on_train_batch_start(batch, taken)
                contender.issue(batch)
        except RuntimeError as error:
            failure = str(error).partition("\n")[0]
        finally:
            if not bench.toy:
                torch.cuda.set_sync_debug_mode("default")
        yield {"recipe": name, "steps": taken, "watched": not bench.toy, "result": failure or "waits for nothing"}
        if failure:
            raise RuntimeError(f"{name}: {failure}")


def loader(bench: Bench) -> Iterator[Row]:
    """The loader alone, and loader and step together, on JPEGs of 500 x 375 pixels."""
    photos = bench.folder / "photos"
    photos.mkdir()
    originals = sorted(PHOTOS.glob("*.jpg"))
    for number in range(16 if bench.toy else 256):
        with Image.open(originals[number % len(originals)]) as image:
            image.convert("RGB").resize((500, 375)).save(photos / f"{number:03}.jpg", quality=90)
    name = next(iter(bench.recipes)) if bench.toy else "MAE ViT-B"
    config = bench.recipes[name].parsed(data=photos, num_workers=bench.workers)
    contender = Contender(name, *build(config, bench.device), bench.precision)
    contender.step()
    (timings,) = compare([contender], 2, lambda: None)
    rates = loader_rates(config, contender, 2 if bench.toy else 30)
    step_alone = config.data.batch_size / median(timing.step for timing in timings)
    named = {"loader img/s": rates["alone"], "step img/s": step_alone, "both img/s": rates["together"]}
    stages = {f"{stage} ms": taken for stage, taken in rates["milliseconds"].items()}
    yield {"recipe": name, "workers": bench.workers} | named | stages


def resume(bench: Bench) -> Iterator[Row]:
    """A run whose last checkpoint is lost goes on from the one before: are numbers and weights the same, to the bit?"""
    first, again = bench.folder / "whole", bench.folder / "again"
    options = ["--config=mae/demo", "--data=shapes", "--epochs=0.25", "--batch_size=32", "--save_every=0.0625"]
    options += ["--log_every=1", "--pictures=0", "--probe_images=60", "--num_workers=0", bench.accelerator]
    _pretrained([*options, *(_TOY if bench.toy else ()), f"--out={first}"])
    shutil.copytree(first, again, symlinks=True)
    newest = max((again / "checkpoints").glob("step-*.ckpt"), key=lambda file: int(file.stem.partition("-")[2]))
    for file in (again / "checkpoints").glob(f"{newest.name}*"):
        file.unlink()
    _pretrained([f"--resume={again}"])
    files = ("metrics.csv", "export/backbone/model.safetensors")
    same = {file: (first / file).read_bytes() == (again / file).read_bytes() for file in files}
    yield {"lost": newest.stem} | {f"{file} equal": equal for file, equal in same.items()}
    if not all(same.values()):
        raise RuntimeError("not equal: " + ", ".join(file for file, equal in same.items() if not equal))


def training(bench: Bench) -> Iterator[Row]:
    """MAE for some minutes, then k-NN beside that of the untrained model."""
    images = 16 if bench.toy else 256
    options = tuple(_TOY) if bench.toy else ()
    recipe = Recipe("mae/demo" if bench.toy else "mae/vit_tiny_patch4_32-cifar10", images, options)
    where: dict[str, object] = {"data": bench.data or "shapes", "num_workers": bench.workers, "threads": 1}
    config = recipe.parsed(**where)
    contender = Contender("MAE", *build(config, bench.device), bench.precision)
    rate = loader_rates(config, contender, 5 if bench.toy else 100)["together"]
    source = instantiate(config).data
    source.open(contender.method.encoder.img_size, contender.method.encoder.in_chans, 0)
    epochs = rate * bench.seconds / len(source.source)
    given = [f"--{name}={value}" for name, value in where.items()]
    given += ["--probe_images=60"] if bench.toy else []
    given += [f"--batch_size={images}", f"--epochs={epochs:.4g}", f"--eval_every={2 * epochs:.4g}", bench.accelerator]
    out = bench.folder / "training"
    start = time.perf_counter()
    _pretrained([f"--config={recipe.config}", *options, *given, "--pictures=0", f"--out={out}"])
    taken = time.perf_counter() - start
    summary = json.loads((out / "summary.json").read_text())
    knn = summary.get("probe", {}).get("knn", {})
    scores = {f"k-NN {name}": sum(values) / len(values) for name, values in knn.items() if isinstance(values, list)}
    yield {"data": bench.data or "shapes", "epochs": epochs, "seconds": taken} | scores


def _pretrained(options: list[str]) -> None:
    _ran([sys.executable, "-m", "mim", "pretrain", *options])


def _ran(command: list[str], cwd: Path | None = None, accepted: tuple[int, ...] = (0,)) -> str:
    """What a program prints; it ends with us, whatever ends us."""
    home = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": paths},
        text=True,
        **streams,  # type: ignore[call-overload]  # of the same kinds
    ) as program:
        try:
            printed, _ = program.communicate()
        except BaseException:
            program.kill()
            raise
    if program.returncode not in accepted:
        raise RuntimeError(f"{' '.join(command[2:5])} ended with {program.returncode}: {printed.strip()[-300:]}")
    return str(printed)

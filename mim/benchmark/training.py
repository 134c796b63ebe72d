"""What a training step costs: time by phase, memory, arithmetic, and the machine's own peak to compare it with.

Times of a shared machine drift, so configurations take turns, step by step, and ratios are taken inside one turn.
"""

import contextlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from jsonargparse import Namespace
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mim.benchmark.plain import PLAIN_LOSSES
from mim.data.crops import Crops, collate
from mim.data.loading import WatchedLoader
from mim.data.pixels import EIGHT_BIT
from mim.data.pretrain import PretrainData
from mim.errors import UserError
from mim.methods import Batch, Method
from mim.randomness import RowGenerator
from mim.run.config import instantiate
from mim.terminal import progress


@dataclass(frozen=True)
class Timing:
    """One step in seconds.

    Args:
        forward: of the loss.
        backward: of the loss.
        optimizer: the check for NaN and the update.
        processor: processor time of all threads; unlike the others it does not grow when the machine is shared.
    """

    forward: float
    backward: float
    optimizer: float
    processor: float

    @property
    def step(self) -> float:
        """The whole step."""
        return self.forward + self.backward + self.optimizer


class Contender:
    """A method with everything that its training step needs.

    Args:
        name: for tables.
        method: on its device.
        batch: what every step sees, on the same device.
        precision: ``32-true`` or ``bf16-mixed``.
        loss: the forward pass; the method's own training step if not given.
        optimizer: the method's own if not given.
        check: what looks at the gradients before the update; the method's own guard if not given.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        batch: Batch,
        precision: str,
        loss: Callable[[Any, Batch], Tensor] | None = None,
        optimizer: Optimizer | None = None,
        check: Callable[[Optimizer], object] | None = None,
    ) -> None:
        self.name, self.method, self.batch, self.precision = name, method.train(), batch, precision
        self.loss = loss or _training_step
        self.optimizer = optimizer or method.configure_optimizers()
        self.check = check or method.on_before_optimizer_step

    @classmethod
    def plain(cls, method: Method, batch: Batch, precision: str) -> "Contender":
        """The textbook formulation of the same method: explicit attention, no fused optimizer; see ``PLAIN_LOSSES``."""
        if type(method) not in PLAIN_LOSSES:
            known = ", ".join(method.__name__ for method in PLAIN_LOSSES)
            raise UserError(
                f"--against plain: {type(method).__name__} has no plain formulation",
                why=f"there is one for {known}",
                hint="--against mae/demo   or another recipe",
            )
        for module in method.modules():
            if isinstance(module, Attention | AttentionRope | EvaAttention):
                module.fused_attn = False  # type: ignore[misc]  # final for TorchScript's sake
        groups = [{**group, "fused": None} for group in method.configure_optimizers().param_groups]
        optimizer = AdamW(groups, fused=False)
        return cls("plain", method, batch, precision, PLAIN_LOSSES[type(method)], optimizer, _gradient_norm)

    def step(self, batch: Batch | None = None) -> Timing:
        """Takes a training step and times it."""
        clock, processor = Clock(self.method.device), time.process_time()
        self.issue(self.batch if batch is None else batch, clock.mark)
        forward, backward, optimizer = clock.laps()
        return Timing(forward, backward, optimizer, time.process_time() - processor)

    def issue(self, batch: Batch, mark: Callable[[], object] = lambda: None) -> None:
        """Takes a training step without waiting for the device; calls ``mark`` after each of its three phases."""
        with self.autocast():
            loss = self.loss(self.method, batch)
        mark()
        loss.backward()  # type: ignore[no-untyped-call]
        mark()
        self.check(self.optimizer)
        self.method.optimizer_step(0, 0, self.optimizer)  # with whatever the method does after it
        self.optimizer.zero_grad(set_to_none=True)
        mark()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the forward pass."""
        if self.precision == "32-true":
            return contextlib.nullcontext()
        return torch.autocast(self.method.device.type, torch.bfloat16)

    def flops(self) -> int:
        """Floating-point operations of the matrix products of forward and backward; a multiply-add counts as two."""
        # Fused attention on a CPU is unknown to torch's counter; the same products written out are known.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, self.autocast():
            self.loss(self.method, self.batch).backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad(set_to_none=True)
        total: int = counter.get_total_flops()
        return total

    def memory(self) -> int:
        """Most bytes that a step holds at once beyond weights and optimizer state: activations and gradients."""
        if self.method.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step()
        return peak_allocation(profiler)


class Timed(Protocol):
    """Whatever can take turns."""

    def step(self) -> Timing:
        """Do it once and say how long it took."""


def compare(contenders: Sequence[Timed], rounds: int, between: Callable[[], object]) -> list[list[Timing]]:
    """Lets contenders take turns, A B A B; calls ``between`` after each round; returns the timings of each."""
    for contender in contenders:
        contender.step()
        contender.step()
    timings: list[list[Timing]] = [[] for _ in contenders]
    for _ in progress(range(rounds), rounds, "timing", "round"):
        for contender, taken in zip(contenders, timings, strict=True):
            taken.append(contender.step())
        between()
    return timings


def ratios(first: Sequence[Timing], second: Sequence[Timing]) -> dict[str, float]:
    """How many times faster ``first`` is than ``second``: median over rounds, fastest steps, processor time."""
    pairs = list(zip(first, second, strict=True))
    return {
        "median": median(b.step / a.step for a, b in pairs),
        "fastest": min(b.step for b in second) / min(a.step for a in first),
        "processor": median(b.processor / a.processor for a, b in pairs),
    }


def build(config: Namespace, device: torch.device) -> tuple[Method, Batch]:
    """A recipe's method, and a batch of noise that went through the recipe's views; both on the device."""
    torch.manual_seed(config.seed)
    objects = instantiate(config)
    method: Method = objects.model.to(device)
    views, labels, keys = noise(objects.data, method)
    finished = objects.data.views.to(device)([view.to(device) for view in views], RowGenerator(keys))
    return method, (finished, labels.to(device))


def noise(data: PretrainData, method: Method) -> tuple[list[Tensor], Tensor, Tensor]:
    """A batch of noise as the loader ships it: cut, but not scaled; views, labels and keys."""
    encoder = method.encoder
    data.views.configure(encoder.img_size, *data.statistics(encoder.in_chans), EIGHT_BIT)
    images = torch.randint(256, (data.batch_size, encoder.in_chans, *encoder.img_size), dtype=torch.uint8)
    views, labels, keys, *_ = collate([(data.views.crop(image), -1, key, []) for key, image in enumerate(images)])
    return views, labels, keys


WORKERS = (1, 2, 4)
"""Loader processes whose rates stand side by side."""


def loader_rates(config: Namespace, contender: Contender, steps: int) -> dict[str, Any]:
    """Images per second that the loader delivers to a device that does nothing else, and to one that trains on them.

    ``by_workers`` has the first for other counts of processes, and what decoding alone would let a core deliver stands
    beside the processor times of one image.
    """
    data: PretrainData = instantiate(config).data
    device, encoder = contender.method.device, contender.method.encoder
    data.open(encoder.img_size, encoder.in_chans, config.seed)
    data.check()

    def batches(workers: int, warm_up: int) -> Iterator[Batch]:
        loader = WatchedLoader(
            Crops(data.source, data.views, config.seed),
            batch_sampler=data.sampler(range(warm_up + steps)),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
        )
        for batch in loader:
            views, labels, generator = data.on_before_batch_transfer(batch, 0)
            moved = [view.to(device, non_blocking=True) for view in views], labels.to(device), generator
            yield data.on_after_batch_transfer(moved, 0)

    def rate(consume: Callable[[Batch], object], workers: int = data.num_workers) -> float:
        start, warm_up = 0.0, 1 + 2 * workers  # what workers prepare ahead says nothing about their speed
        for number, batch in enumerate(batches(workers, warm_up), start=1):
            consume(batch)
            if number == warm_up:
                start = time.perf_counter()
        return data.batch_size * steps / (time.perf_counter() - start)

    rates = {"workers": data.num_workers, "alone": rate(lambda batch: None), "together": rate(contender.step)}
    times = stage_times(data, config.seed, device)
    by_workers = {workers: rate(lambda batch: None, workers) for workers in WORKERS}
    return rates | {"by_workers": by_workers, "milliseconds": times, "decode_bound": 1000 / times["decode"]}


def stage_times(data: PretrainData, seed: int, device: torch.device, count: int = 64) -> dict[str, float]:
    """Processor time per image of what the loader does, in milliseconds: one process, one image after the other.

    Args:
        data: opened and checked.
        seed: of the crops.
        device: where batches go.
        count: images, spread over the set.
    """
    chosen = [place * len(data.source) // count for place in range(count)]
    times, start = {}, time.process_time()

    def lap(stage: str) -> None:
        nonlocal start
        times[stage], start = 1000 * (time.process_time() - start) / count, time.process_time()

    images = [data.source.read(index) for index in chosen]
    lap("decode")
    torch.manual_seed(seed)
    views = [data.views.crop(image) for image in images]
    lap("crop")
    batch, _, keys, *_ = collate([(own, -1, key, []) for key, own in enumerate(views)])
    lap("collate")
    data.views.to(device)([view.to(device) for view in batch], RowGenerator(keys))
    lap("transfer and normalise")
    return times


class MatrixPeak:
    """The highest rate of matrix products seen so far, in FLOP/s.

    Args:
        device: to measure on.
        precision: as of the contenders.
        tokens: rows of the products that the model is made of.
        dim: their width.
    """

    def __init__(self, device: torch.device, precision: str, tokens: int, dim: int) -> None:
        self.device = device
        self.dtype = torch.float32 if precision == "32-true" else torch.bfloat16
        squares = (1024, 2048) if device.type == "cpu" else (4096, 8192)
        self.shapes = [(tokens, dim, 4 * dim), (tokens, 4 * dim, dim), *((side, side, side) for side in squares)]
        self.rate, self.shape = 0.0, self.shapes[0]

    def measure(self, repeats: int = 3) -> None:
        """Times every shape ``(rows, inner, columns)`` a few times and keeps the best."""
        for rows, inner, columns in self.shapes:
            left = torch.randn(rows, inner, device=self.device, dtype=self.dtype)
            right = torch.randn(inner, columns, device=self.device, dtype=self.dtype)
            out = left @ right
            clock = Clock(self.device)
            for _ in range(repeats):
                torch.mm(left, right, out=out)
                clock.mark()
            rate = 2 * rows * inner * columns / min(clock.laps())
            if rate > self.rate:
                self.rate, self.shape = rate, (rows, inner, columns)


def _training_step(method: Method, batch: Batch) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*self.trainer. reference is not registered.*")
        return method.training_step(batch, 0)  # type: ignore[return-value]  # Lightning's type is wider than ours


def _gradient_norm(optimizer: Optimizer) -> Tensor:
    """What the reference logs at every step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def peak_allocation(profiler: profile) -> int:
    """Highest sum of what was allocated and not yet freed, from the trace's memory events."""
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(trace := Path(folder, "trace.json")))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


class Clock:
    """Splits time into laps, by the device's own clock if it has one."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """Ends a lap."""
        if not self.on_gpu:
            self.marks.append(time.perf_counter())
            return
        self.marks.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self.marks[-1].record()

    def laps(self) -> list[float]:
        """Seconds between marks; waits for the device."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if not self.on_gpu:
            return [end - start for start, end in pairs]
        self.marks[-1].synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]

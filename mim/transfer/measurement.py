"""The frame of every evaluation: weights in, the same model untrained beside them, results in the report of the run."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mim.distributed.processes import process_rank
from mim.encoder import Encoder
from mim.errors import UserError
from mim.options.evaluation import EvaluationOptions, Scores
from mim.options.outputs import check_folder
from mim.reduction import Labels
from mim.reduction.files import build_reduction
from mim.reduction.macs import count_macs
from mim.report import write_report
from mim.report.tables import spread, text_table
from mim.run.folder import evaluation_folder, quieten
from mim.run.weights import LoadedEncoder, load_encoder, untrained_encoder

PRETRAINED, UNTRAINED = "pretrained", "untrained"
"""What results call the two encoders that are compared."""

Job = TypeVar("Job")
Result = TypeVar("Result")


class Measurement:
    """Weights that are measured; subclasses open the images and know what is measured.

    Args:
        options: what was asked for.
        opening: how weights are opened beyond that: ``img_size``, ``dynamic_img_size``.

    Attributes:
        loaded: the encoder, with its reduction, on the device.
        device: where encoders compute.
        labels: what a reduction with weights of its own is going to learn from; None if nothing is trained.
    """

    def __init__(self, options: EvaluationOptions, **opening: Any) -> None:  # noqa: ANN401 - of load_encoder
        quieten(process_rank())
        if options.out:
            check_folder("--out", Path(options.out))
        if options.threads:
            torch.set_num_threads(options.threads)
        self.options = options
        self.device = join_processes(options.device)
        self.labels: Labels | None = None
        self._opening = {"model": options.model, "trust": options.trust, **opening}
        self.loaded: LoadedEncoder = load_encoder(options.weights, **self._opening)
        self.loaded.encoder.to(self.device)

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that scores and writes."""
        return process_rank() == 0

    @property
    def workers(self) -> int:
        """Loader processes."""
        given = self.options.num_workers
        return min(16, len(os.sched_getaffinity(0))) if given is None else given

    def fresh(self, who: str, seed: int) -> Encoder:
        """The encoder once more, or untrained as ``seed`` draws it; for a training that takes it apart."""
        if who == UNTRAINED:
            return untrained_encoder(self.options.weights, seed, **self._opening)
        return load_encoder(self.options.weights, **self._opening).encoder

    def reduce(self, encoder: Encoder) -> Encoder:
        """The same encoder with the reduction that was asked for; torch's generator draws what that will learn."""
        if self.options.reduction is not None:
            asked, weights = self.options.reduction, self.options.weights
            encoder.reduction = build_reduction(asked, encoder.vit, self.labels, weights).eval()
        return encoder

    def introduce(self, data: str) -> None:
        """Says what is measured on what, in the main process."""
        if not self.is_main_process:
            return
        print(f"  weights {self.loaded.note}\n  data    {self.options.data}: {data}", flush=True)
        if (reduction := self.loaded.encoder.reduction) is not None:
            print(f"  tokens  {reduction.describe()}", flush=True)

    def reduced_in_words(self) -> str:
        """The reduction, for the line that states the protocol; empty if there is none."""
        encoder = self.loaded.encoder
        if encoder.reduction is None:
            return ""
        share = count_macs(encoder.vit, encoder.reduction).total / count_macs(encoder.vit).total
        return f"; tokens reduced by {encoder.reduction.describe()}, {share:.0%} of the multiply-adds"

    def settings(self, *parts: dict[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
        """What a training's result is a function of: ``parts`` of the options, without some names."""
        merged = {name: value for part in parts for name, value in part.items() if name not in without}
        if (reduction := self.loaded.encoder.reduction) is not None:
            merged["reduction"] = reduction.describe()  # a file may say something else by the time training goes on
        return merged

    def folder(self, name: str) -> Path:
        """Where results go: an evaluation with a reduction does not replace the one without."""
        return evaluation_folder(self.options.weights, self.options.out, section_name(name, self.options.reduction))

    def write(
        self,
        folder: Path,
        title: str,
        protocol: str,
        scores: Scores,
        pool: str,
        details: dict[str, Any] | None = None,
    ) -> None:
        """Prints the results and writes ``metrics.json``, to be followed by pictures and :func:`finish_section`."""
        metrics = {
            what if who == PRETRAINED else f"{what}, {who}": values
            for what, groups in scores.items()
            for who, values in groups.items()
        }
        print(f"\n{title}: {protocol}\n")
        rows = [[what, *(spread(by.get(who, [])) for who in (PRETRAINED, UNTRAINED))] for what, by in scores.items()]
        print(text_table(["", PRETRAINED, UNTRAINED], rows))
        content = {"title": title, "protocol": protocol, "metrics": metrics | (details or {})}
        content |= {"weights": self.options.weights, "data": self.options.data, "note": self.loaded.note, "pool": pool}
        content |= _reduction_facts(self.loaded.encoder, self.options.reduction)
        (folder / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")


def share_out(jobs: Sequence[Job], work: Callable[[Job], Result]) -> list[Result]:
    """The results of all jobs in their order, on every process; each process does its share of them, alone."""
    if not dist.is_initialized():
        return [work(job) for job in jobs]
    rank, world = dist.get_rank(), dist.get_world_size()
    shares: list[list[Result]] = [[] for _ in range(world)]
    dist.all_gather_object(shares, [work(job) for job in jobs[rank::world]])
    return [shares[number % world][number // world] for number in range(len(jobs))]


def finish_section(folder: Path) -> None:
    """Puts the results into the run's report, if they lie in a run, and says where they are."""
    run = folder.parents[1] if folder.parent.name == "evaluation" else None
    print(f"  results {folder / 'metrics.json'}")
    if run is not None and (run / "config.yaml").is_file():
        print(f"  report  {write_report(run)}")


def section_name(name: str, reduction: str | None) -> str:
    """``knn-tome-8`` for an evaluation ``knn`` of a reduced encoder."""
    if reduction is None:
        return name
    file = Path(reduction)
    return f"{name}-{file.stem if file.suffix in ('.yaml', '.yml') else file.name.replace(':', '-')}"


def _reduction_facts(encoder: Encoder, name: str | None) -> dict[str, Any]:
    """What ``metrics.json`` says about the reduction; nothing if there is none."""
    if encoder.reduction is None:
        return {}
    whole, reduced = (count_macs(encoder.vit, reduction).total for reduction in (None, encoder.reduction))
    facts = {"name": name, "settings": encoder.reduction.describe(), "multiply_adds": reduced}
    return {"reduction": facts | {"share_of_multiply_adds": reduced / whole}}


def join_processes(device: str) -> torch.device:
    """The device of this process; waits for the others if torchrun started several.

    Raises:
        UserError: if a GPU is asked for and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here", hint="--device cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo")
    if not cuda:
        return torch.device("cpu")
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(place)
    return place

"""What all measurements of speed do at their two ends: take their place on the machine, and write their numbers."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mim.errors import UserError


def prepare(device: str, threads: int | None) -> torch.device:
    """The device to measure on, with as many processor threads as are wanted, and torch's profiler silent."""
    for variable, level in (("KINETO_LOG_LEVEL", "99"), ("TORCH_CPP_LOG_LEVEL", "ERROR")):
        os.environ.setdefault(variable, level)  # the profiler, asked for memory, talks about much else
    if threads:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here", hint="--device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """Writes ``--json`` if it was asked for."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(f"  json     {path}")

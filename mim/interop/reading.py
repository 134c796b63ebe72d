"""Checkpoint files, read without running what is in them."""

import hashlib
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor

from mim.errors import UserError
from mim.interop.layouts import named_tensors

CHECKSUMS = "SHA256SUMS"


def load_weights(path: Path, *, trust: bool = False, option: str = "--init") -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, read without running code from it.

    Args:
        path: ``.safetensors``, or a file that ``torch.save`` wrote (``.pth``, ``.pt``, ``.ckpt``, ``.bin``).
        trust: unpickle any object, which can run code; only for files whose author the user trusts.
        option: the command-line option that named the file, for messages.

    Raises:
        UserError: if the file is missing, damaged, no checkpoint, not finite or holds Python objects.
    """
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file")
    _check_sum(path, option)
    try:
        safe = path.suffix == ".safetensors"
        checkpoint = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as problem:  # a damaged or hostile file raises almost anything
        raise _unreadable(path, option, problem) from problem
    tensors = named_tensors(checkpoint)
    if not tensors:
        found = f"it holds {', '.join(map(str, checkpoint))[:80]}" if isinstance(checkpoint, dict) else None
        raise UserError(f"{option} {path} holds no model weights", why=found or f"it is a {type(checkpoint).__name__}")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise UserError(
            f"{option} {path}: {len(broken)} of {len(tensors)} tensors are not finite",
            why=f"{broken[0]} holds NaN or infinity, so the run that wrote the file had diverged",
            hint="an earlier checkpoint of that run",
        )
    return tensors


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sum(path: Path, option: str) -> None:
    """Compare with the checksums beside the file, if an export wrote some: most flipped bits load without a word."""
    sums = path.with_name(CHECKSUMS)
    if not sums.is_file():
        return
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in sums.read_text().splitlines())}
    if path.name in expected and expected[path.name] != sha256(path):
        raise UserError(f"{option} {path} is damaged", why=f"its SHA-256 is not the one in {sums}", hint="export again")


def _unreadable(path: Path, option: str, problem: Exception) -> UserError:
    foreign = re.search(r"GLOBAL ([\w.]+)", str(problem))
    if foreign:
        return UserError(
            f"{option} {path}: this file holds Python objects ({foreign[1]}); loading it can run code",
            hint=f"{option} {path} --trust     only if you trust whoever made it",
        )
    # torch's own text is a page about its options, and its first line says nothing about the file.
    reason = type(problem).__name__ if isinstance(problem, UnpicklingError) else str(problem).partition("\n")[0]
    why = f"damaged, cut short or of another kind ({reason or type(problem).__name__})"
    return UserError(f"{option} {path} is not a readable checkpoint", why=why)

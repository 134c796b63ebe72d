"""Checkpoint files that are whole or absent: written aside, hashed, flushed, renamed, and verified before use."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from mim import __version__
from mim.errors import UserError

KEEP = 2
"""Checkpoints kept in a folder: the newest, and the one before in case that is damaged."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes ``step-00000120.ckpt`` beside its SHA-256, then removes older ones; ``last.ckpt`` links to the newest."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Puts ``checkpoint`` at ``path``; those of other steps stay until it is on the disk."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        size = _tensor_bytes(checkpoint)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < 2 * size:  # the file, and as much again so that others can breathe
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with temporary.open("wb") as file:
                writer = _HashingWriter(file)
                torch.save(checkpoint, cast(BinaryIO, writer))
                if writer.failure is not None:
                    raise writer.failure
                file.flush()
                os.fsync(file.fileno())
            facts = {"sha256": writer.digest.hexdigest(), "bytes": writer.written, "step": checkpoint["global_step"]}
            facts |= {"mim": __version__, "torch": torch.__version__}
            _write_aside(sidecar(path), json.dumps(facts).encode())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise _no_room(error, path, size) from error
        _link(path)
        for old in checkpoints(path.parent)[:-KEEP]:
            self.remove_checkpoint(old)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: object = "cpu",
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Reads a checkpoint that :func:`verify` accepts; never runs code from it."""
        if reason := verify(Path(path)):
            raise UserError(f"{path} cannot be used", why=reason)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint and its sidecar."""
        Path(path).unlink(missing_ok=True)
        sidecar(Path(path)).unlink(missing_ok=True)


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}.ckpt"


def checkpoint_step(path: Path) -> int:
    """Steps finished when the checkpoint was written."""
    return int(path.stem.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*.ckpt"))


def sidecar(path: Path) -> Path:
    """Where size and hash of a checkpoint are written."""
    return path.with_suffix(".json")


def verify(path: Path) -> str | None:
    """Why a checkpoint must not be used, or ``None`` if size and SHA-256 are what was written."""
    try:
        facts = json.loads(sidecar(path).read_text())
        if path.stat().st_size != facts["bytes"]:
            return f"it is {path.stat().st_size} bytes long, {facts['bytes']} were written"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != facts["sha256"]:
            return "its contents changed after it was written (SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for every newer one that does not."""
    refused: list[str] = []
    for path in reversed(checkpoints(folder)):
        reason = verify(path)
        if reason is None:
            return path, refused
        refused.append(f"{path} is damaged: {reason}")
    return None, refused


def sweep(folder: Path) -> None:
    """Removes what a killed process left half-written."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


class _HashingWriter:
    """A file that hashes what passes through.

    A failed write is kept for the caller: torch's archive would hide it behind an error of its own.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.written = file, hashlib.sha256(), 0
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.written += len(data)
        try:
            self.file.write(data)
        except OSError as error:
            self.failure = self.failure or error
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _write_aside(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(path: Path) -> None:
    """Points ``last.ckpt`` at the newest checkpoint, for people; nothing of ours reads it."""
    temporary = path.with_name(f".last.{os.getpid()}.tmp")
    with suppress(OSError):  # a file system without links is no reason to end a run whose checkpoint is safe
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path.name)
        os.replace(temporary, path.with_name("last.ckpt"))


def _tensor_bytes(tree: Any) -> int:  # noqa: ANN401
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(map(_tensor_bytes, tree.values()))
    return sum(map(_tensor_bytes, tree)) if isinstance(tree, list | tuple) else 0


def _no_room(error: OSError, path: Path, size: int) -> UserError:
    free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
    return UserError(
        f"{path} cannot be written: {error.strerror}",
        why=f"it needs {size / 2**20:.0f} MiB and as much again in reserve; {free / 2**20:.0f} MiB are free",
        hint="make room, then  python tools/pretrain.py --resume RUN   (the checkpoint before is intact)",
    )

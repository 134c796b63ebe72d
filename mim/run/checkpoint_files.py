"""Checkpoint files that are whole or absent: written aside, hashed, flushed, renamed, and verified before use."""

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, cast

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor, nn

from mim import __version__
from mim.distributed.sharding import local
from mim.errors import MachineError, UserError
from mim.interop import refuse_compressed
from mim.options.outputs import free_bytes
from mim.program import called

KEEP = 2
"""Checkpoints kept in a folder: the newest, and the one before in case that is damaged."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes ``step-00000120.ckpt`` beside its SHA-256, then removes older ones; ``last.ckpt`` links to the newest.

    Args:
        model: what a checkpoint is loaded into; one that does not fit it is refused.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Puts ``checkpoint`` at ``path``; those of other steps stay until it is on the disk."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        size = sum(tensor.nbytes for _, tensor in _tensors(checkpoint))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if free_bytes(path) < 2 * size:  # the file, and as much again so that others can breathe
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with temporary.open("wb") as file:
                writer = _HashingWriter(file)
                writer.take(checkpoint)
                file.flush()
                os.fsync(file.fileno())
            facts = {"sha256": writer.digest.hexdigest(), "bytes": writer.written, "step": checkpoint["global_step"]}
            facts |= {"mim": __version__, "torch": torch.__version__}
            with sidecar(path).open("w") as text:  # not aside: without its checkpoint it means nothing
                text.write(json.dumps(facts))
                text.flush()
                os.fsync(text.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except OSError as error:
            raise _no_room(error, path, size) from error
        finally:
            with suppress(OSError):  # after its renaming there is none
                temporary.unlink()
        _link(path)
        # Later steps than this one are those that a resume found damaged: they do not count.
        for old in [other for other in checkpoints(path.parent) if other.name <= path.name][:-KEEP]:
            self.remove_checkpoint(old)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: object = "cpu",
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Reads a checkpoint that :func:`verify` accepts and that fits; never runs code from it."""
        reason, checkpoint = verify(Path(path)), None
        if reason is None:
            try:
                refuse_compressed(Path(path))
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            except UnpicklingError:  # its text is a page about torch's options
                reason = "it holds Python objects, which a run never writes; nothing in it was executed"
            except Exception as error:  # a hash can be forged, and then the contents may be anything
                reason = f"not readable ({str(error).partition(chr(10))[0] or type(error).__name__})"
        if reason is None and self.model is not None:
            reason = misfit(checkpoint, self.model)
        if reason is not None:
            raise UserError(f"{path} cannot be used", why=reason, hint="an earlier checkpoint, or a new run")
        return cast(dict[str, Any], checkpoint)

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
        if facts["step"] != checkpoint_step(path):
            return f"it was written after {facts['step']} steps"
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


def misfit(checkpoint: object, model: nn.Module) -> str | None:
    """Why a checkpoint cannot be loaded into ``model``, or ``None`` if it can: names, shapes, finite values."""
    parts = ("state_dict", "optimizer_states", "loops", "global_step")
    if not isinstance(checkpoint, dict) or not all(part in checkpoint for part in parts):
        return f"it is not the checkpoint of a run, which holds {', '.join(parts)}"
    if not isinstance(checkpoint["state_dict"], dict):
        return "its state_dict is none"
    if broken := nonfinite(checkpoint):
        return f"{broken[0]} holds NaN or infinity"
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(getattr(value, "shape", ())) for name, value in checkpoint["state_dict"].items()}
    wrong = [name for name in [*own, *theirs] if own.get(name) != theirs.get(name)]
    if wrong:
        here, there = (shapes.get(wrong[0], "missing") for shapes in (own, theirs))
        return f"{len(wrong)} tensors differ from those of this run, first {wrong[0]}: {there} there, {here} here"
    moments = Counter(tuple(value.shape) for name, value in _tensors(checkpoint["optimizer_states"]) if value.ndim)
    room = Counter({shape: 2 * count for shape, count in Counter(own.values()).items()})  # AdamW keeps two of each
    return "the shapes of the optimizer's state are not those of the weights" if moments - room else None


def nonfinite(tree: object) -> list[str]:
    """Names of the tensors in a nested state that hold NaN or infinity here; one wait for the device in all."""
    tensors = [(name, local(value)) for name, value in _tensors(tree) if value.is_floating_point()]
    if not tensors:
        return []
    finite = torch.stack([value.isfinite().all() for _, value in tensors])
    return [name for (name, _), good in zip(tensors, finite.tolist(), strict=True) if not good]


def _tensors(tree: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def sweep(folder: Path) -> None:
    """Removes what a killed process left half-written."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


class _HashingWriter:
    """A file that hashes what passes through."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.written = file, hashlib.sha256(), 0
        self.failure: Exception | None = None

    def take(self, checkpoint: Mapping[str, Any]) -> None:
        """Writes a checkpoint; raises what went wrong first, which torch's archive hides behind an error of its own."""
        try:
            torch.save(checkpoint, cast(BinaryIO, self))
        except RuntimeError as error:
            raise self.failure or error from error
        if self.failure is not None:
            raise self.failure

    def write(self, data: bytes) -> int:
        try:
            self.digest.update(data)
            self.written += len(data)
            self.file.write(data)
        except Exception as error:  # OSError, or what torch raises anywhere when a loader process dies
            self.failure = self.failure or error
        return len(data)

    def flush(self) -> None:
        self.file.flush()


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


def checkpoint_bytes(module: nn.Module) -> int:
    """How large a checkpoint of a module becomes that AdamW trains: its weights, and two moments of those trained."""
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    return int(sum(tensor.nbytes for tensor in module.state_dict().values())) + 2 * trained


def check_room(folder: Path, module: nn.Module) -> None:
    """Refuses a disk that cannot hold the checkpoints of a new run, trained with AdamW.

    Raises:
        UserError: if it has less room than they need.
    """
    size = checkpoint_bytes(module)
    needed = (KEEP + 2) * size
    free = free_bytes(folder)
    if free < needed:
        raise UserError(
            f"--out {folder}: checkpoints need {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free",
            why=f"{size / 2**20:,.0f} MiB each: {KEEP} are kept, the next is written beside them, one is in reserve",
            hint="--out another/disk   or make room",
        )


def _no_room(error: OSError, path: Path, size: int) -> MachineError:
    needed, free, run = size / 2**20, free_bytes(path) / 2**20, path.parents[1]
    pretraining = (run / "config.yaml").is_file()
    again = f"{called('pretrain')} --resume {run}" if pretraining else "the same command with  --resume true"
    return MachineError(
        f"{path} cannot be written: {error.strerror}",
        why=f"it needs {needed:.0f} MiB and as much again in reserve; {free:.0f} MiB are free",
        hint=f"make room, then  {again}   (the checkpoint before is intact)",
    )

"""Features on disk: computed once, memory-mapped, and found again by what they are a function of.

Several processes each compute a contiguous part of the rows and write it to its place: every image is read by exactly
one of them, none twice to fill up a batch, so the file is the one that a single process would write.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mim.encoder import Encoder
from mim.errors import UserError
from mim.evaluation.features import Features, evaluating
from mim.program import called, quoted

Batches = Callable[[range], Iterable[tuple[Tensor, Tensor]]]
"""Gives normalised images ``(B, C, H, W)`` on the encoder's device and their labels ``(B,)`` for a range of rows."""


class Bank(NamedTuple):
    """Features with labels.

    Args:
        features: ``(M, F)`` float32, or patch tokens ``(M, N, D)`` float16; memory-mapped: index it with rows.
        labels: ``(M,)`` int64.
    """

    features: Tensor
    labels: Tensor


def cached_bank(
    cache: Path,
    encoder: Encoder,
    features: Features,
    rows: int,
    facts: dict[str, Any],
    batches: Batches,
    unreadable: Callable[[list[int]], None],
    data: str = "DATA",
) -> Bank:
    """The features of all images; from the disk if the same were computed before.

    To be called by all processes together if there are several. Rows of unreadable images, whose label is negative, are
    left out.

    Args:
        cache: folder that holds all banks.
        encoder: its weights are part of the key.
        features: what to keep of it.
        rows: number of images M.
        facts: whatever else the features are a function of, such as the list of files and how they are cropped.
        batches: reads images.
        unreadable: is told the rows that are left out, also when the features were computed before.
        data: what the user calls the images, for messages.

    Raises:
        UserError: if the disk is too small or no image can be read.
        ValueError: if a feature is NaN or infinite, or the encoder has no such features.
    """
    shape = (rows, *features.shape(encoder))
    key = {"weights": weights_digest(encoder), **asdict(features), "shape": shape, **facts}
    folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    if not _agreed(folder.is_dir()):
        partial = folder.with_name(f".{folder.name}.partial")
        if _rank() == 0:
            _allocate(partial, shape, np.float16 if features.pool == "tokens" else np.float32)
        _wait()
        _fill(partial, encoder, features, batches)
        _wait()
        if _rank() == 0:
            _put_in_place(partial, folder, {name: str(value)[:200] for name, value in key.items()})
        _wait()
    everything, labels = _open(folder)
    readable = labels >= 0
    unreadable((~readable).nonzero()[:, 0].tolist())
    if not readable.any():
        hint = f"{called('check_data')} --data {quoted(data)}"
        raise UserError(f"none of the {len(labels)} images can be read", hint=hint)
    return Bank(everything, labels) if readable.all() else Bank(everything[readable], labels[readable])


def weights_digest(encoder: Encoder) -> str:
    """SHA-256 of an encoder's weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def part_of(rows: int, rank: int, world_size: int) -> range:
    """The rows of one process: contiguous, together all of them, their numbers differing by one at most."""
    return range(rows * rank // world_size, rows * (rank + 1) // world_size)


def _allocate(folder: Path, shape: tuple[int, ...], dtype: type[np.floating[Any]]) -> None:
    """Makes the files at full size; a full disk is noticed now, as writing into a map would end the process later."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free < 1.05 * size:
            raise UserError(
                f"{folder.parent}: features need {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
                hint="--cache another/folder",
            )
        np.lib.format.open_memmap(folder / "features.npy", "w+", dtype, shape).flush()
        np.lib.format.open_memmap(folder / "labels.npy", "w+", np.int64, shape[:1]).flush()
    except OSError as error:
        raise UserError(
            f"{folder.parent} cannot be written: {error.strerror}", hint="--cache another/folder"
        ) from error


def _fill(folder: Path, encoder: Encoder, features: Features, batches: Batches) -> None:
    """Computes this process's rows."""
    bank, labels = (np.lib.format.open_memmap(folder / f"{name}.npy", "r+") for name in ("features", "labels"))
    own = part_of(len(bank), _rank(), dist.get_world_size() if dist.is_initialized() else 1)
    row = own.start
    with evaluating(encoder), torch.inference_mode():
        for images, truth in batches(own):
            values = features.of(encoder, images).cpu().numpy().astype(bank.dtype)
            if not np.isfinite(values).all():
                raise ValueError("the encoder's features hold NaN or infinite values; its weights have diverged")
            bank[row : row + len(values)], labels[row : row + len(values)] = values, truth.numpy()
            row += len(values)
    assert row == own.stop, "a reader must give every row that it is asked for"
    bank.flush()
    labels.flush()


def _put_in_place(partial: Path, folder: Path, facts: dict[str, str]) -> None:
    """A folder with its final name is whole."""
    (partial / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    try:
        os.replace(partial, folder)
    except OSError:  # another program has just finished the same features
        shutil.rmtree(partial, ignore_errors=True)


def _open(folder: Path) -> Bank:
    """All rows, also of images that could not be read."""
    # Copy on write: torch wants memory it could write to, the file must never change.
    features = torch.from_numpy(np.lib.format.open_memmap(folder / "features.npy", "c"))
    return Bank(features, torch.from_numpy(np.load(folder / "labels.npy")))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def _agreed(found: bool) -> bool:
    """What the first process has found, told to all: they must go the same way."""
    if not dist.is_initialized():
        return found
    answer = [found]
    dist.broadcast_object_list(answer)
    return answer[0]

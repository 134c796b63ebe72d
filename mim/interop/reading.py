"""Checkpoint files, read without running what is in them."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile, ZipFile, is_zipfile

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from mim.errors import UserError
from mim.interop.hf_folder import MODEL_TYPES
from mim.interop.layouts import NoViTError, named_tensors, to_timm
from mim.interop.sharded import INDEX, refuse_part, shards_of
from mim.interop.unpickling import unpickled
from mim.lora import merged
from mim.program import called, quoted
from mim.vit import without_weights

CHECKSUMS = "SHA256SUMS"
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_WEIGHT_FILES = (*_WHOLE, *(f"{name}{INDEX}" for name in _WHOLE))
_OTHER_KINDS = {
    ".npz": "a file of NumPy arrays, such as weights of JAX",
    ".h5": "a file of TensorFlow's weights",
    ".msgpack": "a file of Flax's weights",
    ".onnx": "an ONNX graph with its weights",
    ".gguf": "a file of quantised weights",
    ".tflite": "a TensorFlow Lite graph with its weights",
}
_SPREAD = 4  # weights may take so many times their file's bytes: fp8 as fp32
_ADAPTER = re.compile(r"(?:^|[._])lora_[abAB](?:[._]|$)")
_SMALL = 1 << 26  # 64 MiB, below which nobody has to account for memory
_DEPTH = 1000  # blocks of a model that a folder may ask for


def load_weights(path: Path, *, trust: bool = False, option: str = "--init") -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, read without running code from it.

    Args:
        path: ``.safetensors``, a file that ``torch.save`` wrote (``.pth``, ``.pt``, ``.ckpt``, ``.bin``), or the
            ``.index.json`` of either in shards.
        trust: unpickle any object, which can run code; only for files whose author the user trusts.
        option: the command-line option that named the file, for messages.

    Raises:
        UserError: if the file is missing, damaged, a part, no checkpoint, not finite or holds unknown Python objects.
    """
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file")
    if not path.name.endswith(INDEX):
        refuse_part(path, option)
        return _of_file(path, trust, option)
    shards = [_of_file(shard, trust, option) for shard in shards_of(path, option)]
    twice = [name for name, count in Counter(name for shard in shards for name in shard).items() if count > 1]
    if twice:
        raise UserError(f"{option} {path}: {twice[0]} is in more than one shard", hint="the shards of one checkpoint")
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def _of_file(path: Path, trust: bool, option: str) -> dict[str, Tensor]:
    _refuse_stand_in(path, option)
    _check_sum(path, option)
    try:
        safe = _is_safetensors(path)
        if not safe:
            refuse_compressed(path)
        checkpoint = load_file(path) if safe else unpickled(path, trust=trust)
    except Exception as problem:  # a damaged or hostile file raises almost anything
        raise _unreadable(path, option, problem) from problem
    tensors = named_tensors(checkpoint)
    if not tensors:
        found = f"it holds {', '.join(map(str, checkpoint))[:80]}" if isinstance(checkpoint, dict) else None
        raise UserError(f"{option} {path} holds no model weights", why=found or f"it is a {type(checkpoint).__name__}")
    if reason := _beyond(tensors, path):
        raise UserError(f"{option} {path} is not a readable checkpoint", why=reason)
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise UserError(
            f"{option} {path}: {len(broken)} of {len(tensors)} tensors are not finite",
            why=f"{broken[0]} holds NaN or infinity, so the run that wrote the file had diverged",
            hint="an earlier checkpoint of that run",
        )
    return tensors


def read_vit(path: Path, *, trust: bool = False, option: str = "--init") -> tuple[str, dict[str, Tensor]]:
    """Name of a file's layout and the tensors of the ViT in it under timm's names.

    Args:
        path: see :func:`load_weights`.
        trust: see :func:`load_weights`.
        option: see :func:`load_weights`.

    Raises:
        UserError: as :func:`load_weights`, and if there is no ViT in the file.
    """
    tensors = load_weights(path, trust=trust, option=option)
    if adapters := [name for name in tensors if _ADAPTER.search(name)]:
        raise UserError(
            f"{option} {path} holds LoRA adapters that are not merged into the weights",
            why=f"such as {adapters[0]}; without them it is another model",
            hint=f"torch.save(model.merge_and_unload().state_dict(), '{path.stem}-merged.pth')   with peft",
        )
    try:
        return to_timm(merged(tensors))
    except NoViTError as error:
        some = ", ".join(sorted(tensors, key=len)[:: max(1, len(tensors) // 4)][:4])
        raise UserError(
            f"{option} {path}: no Vision Transformer was found in it",
            why=f"{error}; its {len(tensors)} tensors are named like {some[:200]}",
            hint=f"{option} FILE in a layout of docs/weights.md",
        ) from None


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_checksums(folder: Path, names: Iterable[str]) -> None:
    """Adds files to those of an export whose sums are compared when they are read."""
    with (folder / CHECKSUMS).open("a", encoding="utf-8") as file:
        file.writelines(f"{sha256(folder / name)}  {name}\n" for name in names)


def weights_in(folder: Path) -> Path:
    """The weight file of a folder, or the index of its shards."""
    files = [folder / name for name in _WEIGHT_FILES]
    return next(filter(Path.is_file, files), files[0])


def scale_of(folder: Path) -> object:
    """What the ``config.json`` of a timm folder says about the numbers in the images; None if it says nothing."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return settings.get("pixels") if isinstance(settings, dict) else None


def check_timm_folder(folder: Path, option: str) -> None:
    """Refuses a timm folder whose ``config.json`` is broken or asks for more than its weights are worth.

    Raises:
        UserError: before any memory is spent on the model.
    """
    config, weights = folder / "config.json", weights_in(folder)
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        if "model_type" in settings and "architecture" not in settings:
            raise ValueError(f"a {settings['model_type']} of Hugging Face is not read; {', '.join(MODEL_TYPES)} are")
        if int(settings.get("model_args", {}).get("depth", 0)) > _DEPTH:
            raise ValueError(f"it asks for a model of more than {_DEPTH} blocks")
        with without_weights():
            model = timm.create_model(f"local-dir:{folder}", num_classes=0)
        needed = sum(value.nbytes for value in model.state_dict().values())
        size = sum(file.stat().st_size for file in _files_of(weights, option))
        if needed > _SPREAD * size + _SMALL:
            raise ValueError(f"it asks for a model of {needed >> 20} MiB, {weights.name} has {size >> 20}")
    except Exception as problem:  # a file from anywhere may ask timm for anything
        reason = str(problem).partition("\n")[0][:200] or "it is no JSON that can be read"
        raise UserError(f"{option} {folder}: {config.name} is not that of a model", why=reason) from problem


def _files_of(weights: Path, option: str) -> list[Path]:
    return shards_of(weights, option) if weights.name.endswith(INDEX) else [weights]


def refuse_compressed(path: Path) -> None:
    """Raises ``ValueError`` for a compressed archive: ``torch.save`` writes none, and it may unpack to any size."""
    try:
        with ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_size < entry.file_size]
    except (BadZipFile, OSError, NotImplementedError):
        return  # the old format, or damaged; torch will tell
    if packed:
        raise ValueError(f"{packed[0]} is compressed, which no checkpoint is")


def _beyond(tensors: dict[str, Tensor], path: Path) -> str | None:
    """What is wrong with tensors that are no numbers in memory, or a few numbers seen as many."""
    if unreal := [name for name, tensor in tensors.items() if tensor.is_meta]:
        return f"{unreal[0]} has no values"
    hollow = [name for name, tensor in tensors.items() if not tensor.numel()]
    if 2 * len(hollow) > len(tensors):
        return f"{len(hollow)} of its {len(tensors)} tensors are empty, such as {hollow[0]}: a part of sharded weights"
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if declared > _SPREAD * path.stat().st_size + _SMALL:
        return f"its tensors claim {declared / 2**30:.1f} GiB, the file has {path.stat().st_size / 2**30:.3f}"
    return None


def _check_sum(path: Path, option: str) -> None:
    """Compare with the checksums beside the file, if an export wrote some: most flipped bits load without a word."""
    sums = path.with_name(CHECKSUMS)
    if not sums.is_file():
        return
    lines = sums.read_text(errors="replace").splitlines()  # the sums may be what is damaged
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if path.name in expected and expected[path.name] != sha256(path):
        raise UserError(
            f"{option} {path} is damaged", why=f"its SHA-256 is not the one in {sums}", hint=export_again(path.parent)
        )


def export_again(folder: Path) -> str:
    """What to do about a damaged export: the run that it lies in can repeat it."""
    run = folder.absolute().parents[1]
    return f"{called('export')} --run {quoted(run)}" if (run / "config.yaml").is_file() else "export it again"


def _refuse_stand_in(path: Path, option: str) -> None:
    """Names what is often downloaded in place of weights: a Git LFS pointer, or a page of a web site."""
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{option} {path} is a Git LFS pointer, not the weights",
            why="the repository was cloned without its large files",
            hint=f"git -C {quoted(path.parent)} lfs pull",
        )
    if head.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise UserError(
            f"{option} {path} is a web page, not the weights",
            why="a link to the page about the file was downloaded, or a login page",
            hint="curl -L -O ADDRESS   with the address of the file itself, not of the page about it",
        )


def _is_safetensors(path: Path) -> bool:
    """By its first bytes, length of a header and the header, whatever it is called; by its name if it is damaged."""
    with path.open("rb") as file:
        length, brace = int.from_bytes(file.read(8), "little"), file.read(1)
    if path.suffix == ".safetensors":
        return not is_zipfile(path)
    return brace == b"{" and 2 <= length <= path.stat().st_size - 8


def _unreadable(path: Path, option: str, problem: Exception) -> UserError:
    if (kind := _OTHER_KINDS.get(path.suffix.lower())) is not None:
        return UserError(
            f"{option} {path} is {kind}, which are not read",
            why="read are what torch.save wrote (.pth, .pt, .ckpt, .bin) and .safetensors",
            hint=f"torch.save(model.state_dict(), '{path.with_suffix('.pth').name}')   in the program that opens it",
        )
    foreign = re.search(r"GLOBAL ([\w.]+)", str(problem))
    if foreign:
        return UserError(
            f"{option} {path}: this file holds Python objects ({foreign[1]}); loading it can run code",
            hint=f"{option} {quoted(path)} --trust     only if you trust whoever made it",
        )
    # torch's own text is a page about its options, and its first line says nothing about the file.
    reason = type(problem).__name__ if isinstance(problem, UnpicklingError) else str(problem).partition("\n")[0]
    why = f"damaged, cut short or of another kind ({reason or type(problem).__name__})"
    return UserError(f"{option} {path} is not a readable checkpoint", why=why)

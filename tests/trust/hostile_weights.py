"""Weight files and folders that are not what they seem, each in the forms in which people pass weights on.

Those with a canary leave a file called ``executed`` beside them if anything in them is run.
"""

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors.torch import save


class Case(NamedTuple):
    name: str
    make: Callable[[Path], None]  # writes the file or folder


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path, call: Callable = Path.touch) -> None:
        self.path, self.call = path, call

    def __reduce__(self):
        return self.call, (self.path if self.call is Path.touch else f"touch {self.path}",)


@cache
def good() -> dict[str, torch.Tensor]:
    """What ``test_vit`` at 32 pixels in patches of 8 holds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0).state_dict()


def canary(path: Path) -> Touch:
    return Touch(path.with_name("executed"))


def cases() -> Iterator[Case]:
    """All of them, one after another."""
    yield from _pickled()
    yield from _damaged()
    yield from _numbers()
    yield from _folders()


# Code ----------------------------------------------------------------------------------------------------------------

CALLS = {"touch": Path.touch, "system": os.system}
PLACES = {
    "bare": lambda thing: thing,
    "beside": lambda thing: {"state_dict": good(), "args": thing},
    "inside": lambda thing: {"state_dict": good() | {"blocks.9": thing}},
    "as-key": lambda thing: OrderedDict({"state_dict": good(), ("a", 1): [{"x": thing}]}),
}
SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")


def _pickled() -> Iterator[Case]:
    for call, function in CALLS.items():
        for place, wrap in PLACES.items():
            for suffix in SUFFIXES:
                for zipped in (True, False):
                    name = f"{call}-{place}-{'zip' if zipped else 'legacy'}{suffix}"
                    yield Case(name, _saver(wrap, function, zipped))
    for protocol in range(6):
        yield Case(f"protocol-{protocol}.pth", _pickler(protocol))
    for suffix in (".safetensors", ".pth"):
        yield Case(f"pickle-called{suffix}", _pickler(2))


def _saver(wrap: Callable, function: Callable, zipped: bool) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        thing = Touch(path.with_name("executed"), function)
        torch.save(wrap(thing), path, _use_new_zipfile_serialization=zipped)

    return write


def _pickler(protocol: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(pickle.dumps({"state_dict": canary(path)}, protocol))


# Damage --------------------------------------------------------------------------------------------------------------


def whole(suffix: str) -> bytes:
    if suffix == ".safetensors":
        return save(good())
    buffer = io.BytesIO()
    torch.save({"state_dict": good()}, buffer)
    return buffer.getvalue()


def _damaged() -> Iterator[Case]:
    for suffix in (".pth", ".safetensors"):
        data = whole(suffix)
        cut = {"half": data[: len(data) // 2], "start": data[:20], "empty": b"", "zeros": b"\0" * 5000}
        cut |= {"almost": data[:-1], "html": b"<!DOCTYPE html><html>404</html>", "lfs": b"version https://git-lfs\n"}
        for name, content in cut.items():
            yield Case(f"{name}{suffix}", _writer(content))
    header = b'{"a":{"dtype":"F32","shape":[99999,99999,99],"data_offsets":[0,3960000000000]}}'
    yield Case("gigantic.safetensors", _writer(struct.pack("<Q", len(header)) + header))
    yield Case("header-of-exabytes.safetensors", _writer(b"\xff" * 8 + b"{}"))
    yield Case("gigantic-storage-legacy.pth", _gigantic_storage)
    yield Case("gigantic-view.pth", _gigantic_view)
    yield Case("deflated-bomb.pth", _deflated_bomb)
    yield Case("nested.pth", _nested)


def _writer(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


def _gigantic_storage(path: Path) -> None:
    """A file of the old format that declares a storage of terabytes."""
    torch.save({"state_dict": {"a": torch.zeros(1_234_567)}}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    number, more = (pickle.dumps(n, 2)[2:-1] for n in (1_234_567, 1 << 40))
    path.write_bytes(data[: data.index(number) + 2000].replace(number, more))


def _gigantic_view(path: Path) -> None:
    """One number, seen as a matrix of four terabytes."""
    torch.save({"state_dict": good() | {"a": torch.zeros(1).expand(1_000_000, 1_000_000)}}, path)


def _deflated_bomb(path: Path) -> None:
    """Zeros that take a thousandth of their size; gigabytes of them would be as easy."""
    plain = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(7)}}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            if entry.filename.endswith("data/0"):
                with target.open(entry.filename, "w", force_zip64=True) as file:
                    file.write(bytes(1 << 24))
            else:
                target.writestr(entry.filename, source.read(entry))


def _nested(path: Path) -> None:
    tree: dict = {}
    for _ in range(200):
        tree = {"state_dict": tree}
    torch.save(tree, path)


# Numbers -------------------------------------------------------------------------------------------------------------


def _numbers() -> Iterator[Case]:
    changed = {
        "nan": lambda w: w.fill_(float("nan")),
        "one-nan": lambda w: w.view(-1)[3:4].fill_(float("nan")),
        "infinite": lambda w: w.fill_(float("inf")),
        "transposed": lambda w: w.T.contiguous(),
        "scalar": lambda w: w.sum(),
        "integers": lambda w: w.long(),
        "complex": lambda w: w.to(torch.complex64),
        "sparse": lambda w: w.to_sparse(),
        "empty-tensor": lambda w: w[:0],
        "meta": lambda w: w.to("meta"),
        "string": lambda w: "weights",
    }
    for name, change in changed.items():
        yield Case(f"{name}.pth", _changer(change))
    yield Case("no-tensors.pth", lambda path: torch.save({"epoch": 3}, path))
    yield Case("a-list.pth", lambda path: torch.save([good()], path))
    yield Case("a-tensor.pth", lambda path: torch.save(torch.zeros(3), path))


def _changer(change: Callable) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save({"state_dict": {name: change(w.clone()) if w.ndim == 2 else w for name, w in good().items()}}, path)

    return write


# Folders -------------------------------------------------------------------------------------------------------------


def _folders() -> Iterator[Case]:
    yield Case("sharded", _sharded)
    yield Case("pickle-in-timm-folder", _timm_folder("pytorch_model.bin", lambda path: torch.save(canary(path), path)))
    yield Case("timm-folder-without-weights", _timm_folder(None, None))
    good_weights = ("model.safetensors", _writer(whole(".safetensors")))
    configs = {
        "text": "text",
        "a-list": "[]",
        "no-architecture": "{}",
        "foreign-architecture": '{"architecture": "os.system"}',
        "path-as-architecture": '{"architecture": "../../../etc/passwd"}',
        "architecture-of-another-kind": '{"architecture": "resnet18"}',
        "unknown-argument": asking('{"command": "touch executed"}'),
        "callable-as-text": asking('{"block_fn": "os.system"}'),
        "gigantic-model": asking('{"embed_dim": 1000000000, "num_heads": 1}'),
        "negative-model": asking('{"embed_dim": -8}'),
        "endless-model": asking('{"depth": 1000000000}'),
        "arguments-as-list": asking("[1]"),
        "pretrained-as-text": '{"architecture": "test_vit", "pretrained_cfg": "x"}',
        "deep-json": "[" * 100_000,
    }
    for name, config in configs.items():
        yield Case(f"timm-folder-{name}", _timm_folder(*good_weights, config=config))


def asking(arguments: str) -> str:
    return '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": ' + arguments + "}"


def _timm_folder(file: str | None, write: Callable | None, config: str | None = None) -> Callable[[Path], None]:
    default = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": {}}
    default |= {"model_args": {"img_size": 32, "patch_size": 8}}

    def make(path: Path) -> None:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(default) if config is None else config)
        if file is not None and write is not None:
            write(path / file)

    return make


def _sharded(path: Path) -> None:
    path.mkdir()
    (path / ".metadata").write_bytes(pickle.dumps(canary(path)))
    (path / "__0_0.distcp").write_bytes(pickle.dumps(canary(path)))

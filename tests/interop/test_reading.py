"""Each kind of file that is no checkpoint ends in one UserError, and nothing in it is run."""

import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mim.errors import UserError
from mim.interop import load_weights


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Settings:
    """Of a package that nobody knows."""


def saved(path, content, **kwargs):
    torch.save(content, path, **kwargs)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".pt"])
def test_a_checkpoint_gives_its_tensors(tmp_path, suffix):
    path = saved(tmp_path / f"x{suffix}", {"model": {"a": torch.arange(3.0)}, "epoch": 3})
    assert load_weights(path)["a"].tolist() == [0, 1, 2]


def test_safetensors_gives_its_tensors(tmp_path):
    save_file({"a": torch.arange(3.0)}, tmp_path / "x.safetensors")
    assert load_weights(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("new_format", [True, False])
def test_python_objects_are_refused_and_named(tmp_path, new_format):
    content = {"model": {"a": torch.ones(2)}, "args": Settings()}
    path = saved(tmp_path / "x.pth", content, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError) as info:
        load_weights(path)
    assert str(info.value).splitlines() == [
        f"error: --init {path}: this file holds Python objects (test_reading.Settings); loading it can run code",
        f"try:   --init {path} --trust     only if you trust whoever made it",
    ]
    assert load_weights(path, trust=True)["a"].tolist() == [1, 1]


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_file_does_not_run(tmp_path, new_format):
    canary = tmp_path / "ran"
    path = saved(tmp_path / "x.pth", {"model": Canary(canary)}, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match="Python objects"):
        load_weights(path)
    assert not canary.exists()


def test_code_in_a_bare_pickle_does_not_run(tmp_path):
    canary = tmp_path / "ran"
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(UserError):
        load_weights(tmp_path / "x.pth")
    assert not canary.exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"--weights {tmp_path / 'x.pth'}: no such file")):
        load_weights(tmp_path / "x.pth", option="--weights")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"404: not found", b"PK\x03\x04" + b"0" * 99, b"version 1", b"\x80\x02}"])
def test_other_files_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a readable checkpoint"):
        load_weights(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_files_are_refused(tmp_path, suffix, share):
    path = tmp_path / f"x{suffix}"
    tensors = {"a": torch.randn(1000)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match="is not a readable checkpoint"):
        load_weights(path)


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], torch.ones(3), {"model": "none"}, {"model": {"a": 1}}])
def test_a_file_without_weights_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="holds no model weights"):
        load_weights(saved(tmp_path / "x.pth", content))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    path = saved(tmp_path / "x.pth", {"a": torch.ones(3), "b": torch.tensor([1.0, value])})
    with pytest.raises(UserError, match="1 of 2 tensors are not finite"):
        load_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "what", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer", "lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page", "curl -L"),
        (b"<html>404</html>", "a web page", "curl -L"),
    ],
)
def test_what_was_downloaded_in_place_of_weights_is_named(tmp_path, suffix, content, what, hint):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_weights(path)
    assert refused.value.error == f"--init {path} is {what}, not the weights"
    assert hint in refused.value.hint

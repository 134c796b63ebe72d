"""Python objects beside weights: those of known packages are passed over and never built, others are refused."""

import argparse
import collections
import datetime
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from lightning.fabric.utilities.data import AttributeDict
from test_foreign_layouts import prefixed, vit

from mim.errors import UserError
from mim.interop import load_weights
from mim.interop.unpickling import unpickled
from mim.run.weights import init_backbone


class Recording(torch.nn.Linear):
    """A module of an unknown package that tells if it is built."""


BESIDE = {
    "argparse": lambda model: argparse.Namespace(lr=1, folder=pathlib.Path("runs")),
    "types": lambda model: SimpleNamespace(lr=1),
    "lightning": lambda model: AttributeDict(lr=1),
    "numpy": lambda model: {"best": np.float64(0.3), "history": np.ones(3), "dtype": np.dtype("int8")},
    "time": lambda model: datetime.datetime(2026, 1, 1),
    "defaultdict": lambda model: collections.defaultdict(int, {"seen": 1}),
    # lightly-train keeps the model itself, and what it wraps it in, beside the state.
    "modules": lambda model: {
        "version": "0.14",
        "models": {"model": model, "wrapped_model": torch.nn.Sequential(model)},
    },
}


@pytest.mark.parametrize("beside", BESIDE)
def test_weights_land_beside_objects_of_known_packages(beside, tmp_path):
    source, other, target = vit(), vit(), vit()
    content = {"state_dict": prefixed("model.", source.state_dict()), "lightly_train": BESIDE[beside](other)}
    torch.save(content, tmp_path / "x.ckpt")
    assert init_backbone(target, str(tmp_path / "x.ckpt")).startswith("init: 30 of 30 tensors")
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("container", [lambda model: model, lambda model: {"epoch": 3, "model": model}])
def test_a_whole_model_that_was_saved_is_its_state(container, trust, tmp_path):
    source, target = vit(), vit()
    torch.save(container(source), tmp_path / "x.pth")
    init_backbone(target, str(tmp_path / "x.pth"), trust=trust)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())


def test_no_class_of_the_file_is_touched(tmp_path, monkeypatch):
    torch.save({"model": {"a": torch.ones(2)}, "net": timm.create_model("test_vit")}, tmp_path / "x.pth")

    def refuse(*args, **kwargs):
        raise AssertionError("an object of the file was built")

    for kind in (torch.nn.Linear, torch.nn.Module, timm.models.VisionTransformer):
        monkeypatch.setattr(kind, "__setstate__", refuse, raising=False)
        monkeypatch.setattr(kind, "__init__", refuse)
    assert unpickled(tmp_path / "x.pth", trust=False)["model"]["a"].tolist() == [1, 1]


def test_objects_of_other_packages_are_refused_and_named(tmp_path):
    torch.save({"model": vit().state_dict(), "args": argparse.Namespace(), "net": Recording(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(UserError) as refused:
        load_weights(tmp_path / "x.pth")
    assert "this file holds Python objects (" in refused.value.error
    assert refused.value.hint.startswith(f"--init {tmp_path / 'x.pth'} --trust ")
    assert "blocks.0.norm1.weight" in load_weights(tmp_path / "x.pth", trust=True)


def test_a_module_within_itself_comes_to_an_end(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    module._modules["1"] = module._modules["2"] = module
    for _ in range(40):  # shared twice on every level: a trillion names
        module = torch.nn.Sequential(module, module)
    torch.save({"model": module}, tmp_path / "x.pth")
    assert len(load_weights(tmp_path / "x.pth")) == 2

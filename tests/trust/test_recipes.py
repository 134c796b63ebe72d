"""No method is left out of the harnesses."""

import importlib
import pkgutil

import pytest
from recipes import ROOT, SETTINGS, exported_methods, uncovered

from mim import methods
from mim.cli import translate
from mim.methods import MAE, Method
from mim.run.config import instantiate, parse


def test_every_method_is_killed_poisoned_and_spread_over_processes():
    assert uncovered() == set()


def test_a_new_method_without_a_recipe_would_be_noticed(monkeypatch):
    monkeypatch.setattr(methods, "Forgotten", type("Forgotten", (Method,), {}), raising=False)
    monkeypatch.setattr(methods, "__all__", [*methods.__all__, "Forgotten"])
    assert uncovered() == {"Forgotten"}


def test_every_method_that_is_written_is_exported():
    modules = [
        importlib.import_module(f"mim.methods.{module.name}") for module in pkgutil.iter_modules(methods.__path__)
    ]
    written = {
        cls
        for module in modules
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, Method) and cls.__module__ == module.__name__
    }
    assert written - {Method} == exported_methods()
    assert MAE in written


@pytest.mark.parametrize("name", SETTINGS)
def test_a_tiny_run_has_images_and_blocks_of_test_size(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    method = instantiate(parse(translate(SETTINGS[name]))).model
    assert method.encoder.img_size == ((64, 64) if name == "spark" else (32, 32))  # whose places are 32 px
    assert sum(parameter.numel() for parameter in method.parameters()) < 2_000_000

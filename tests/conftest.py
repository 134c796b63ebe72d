"""One thread and one seed: fast on shared cores, and repeatable; and weights that commands look into."""

import gc
import os
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hint_places import Typist

from mim.data.shapes import ShapeSource
from mim.encoder import Encoder
from mim.evaluation.logistic import linear_answers
from mim.interop import ModelCard
from mim.run.weights import export_backbone

TYPIST = pytest.StashKey[Typist]()

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--typed", type=Path, help="type every hint that a test makes a command print; keep what came of it here"
    )


def pytest_configure(config):
    if file := config.getoption("--typed"):
        config.stash[TYPIST] = Typist(file)
        config.stash[TYPIST].install(pytest.MonkeyPatch())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if typist := item.config.stash.get(TYPIST, None):
        typist.type_all()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if typist := item.config.stash.get(TYPIST, None):
        typist.test = item.nodeid
        typist.heard.clear()


def pytest_collection_finish():
    """Modules and thousands of tests stay to the end: garbage is no longer looked for among them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A timm folder of an encoder whose positions and norms differ from their initial values."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        encoder = Encoder("test_vit", img_size=32, patch_size=8)
        for parameter in encoder.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("weights") / "backbone"
    card = ModelCard(method="MAE", data="shapes", data_licence="cc0-1.0")
    export_backbone(encoder.vit, folder, mean=[0.5] * 3, std=[0.25] * 3, card=card, model_args={})
    return str(folder)


@lru_cache(maxsize=8192)
def _drawn(seed, split, size, index, draw=ShapeSource.read_pair):
    return draw(ShapeSource(split, index + 1, size, seed), index)


@pytest.fixture(scope="module", autouse=True)
def _shapes_are_drawn_once(request):
    """A millisecond for each image, in every run and evaluation; but where the drawing itself is tested."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_shapes":

            def read_pair(self, index):
                image, mask = _drawn(self.seed, self.split, self.size, index)
                return image.clone(), mask.clone()

            patch.setattr(ShapeSource, "read_pair", read_pair)
        yield


@pytest.fixture(scope="module")
def quick_probes():
    """Linear probes of runs take the strongest penalty and choose none: a tenth of the time, other last digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("mim.evaluation.probe"), "linear_answers", partial(linear_answers, l2=(1.0,)))
        yield


@pytest.fixture
def typist(request):
    """Overhears commands, and types what stands behind ``try:`` when it is told to."""
    if (typing := request.config.stash.get(TYPIST, None)) is not None:
        yield typing
        return
    with pytest.MonkeyPatch.context() as patch:
        typing = Typist(None)
        typing.install(patch)
        yield typing

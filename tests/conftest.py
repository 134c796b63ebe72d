"""One thread and one seed: fast on shared cores, and repeatable; and weights that commands look into."""

import os

import pytest
import torch

from mim.encoder import Encoder
from mim.interop import ModelCard
from mim.run.weights import export_backbone

os.environ.setdefault("HF_HUB_OFFLINE", "1")


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

import pytest
import torch
from small_models import MODELS, build


@pytest.fixture(scope="session")
def models():
    return {name: build(name) for name in MODELS}


@pytest.fixture
def images():
    return torch.randn(3, 3, 40, 40)

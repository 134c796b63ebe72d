"""What a test of a GPU needs: one that is there, or the reason why the test is skipped."""

import pytest
import torch


@pytest.fixture(autouse=True)
def device():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device: run this where one is, as tools/benchmark.py --gpu_report does")
    return torch.device("cuda", 0)

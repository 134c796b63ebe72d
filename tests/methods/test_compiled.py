"""Training steps as one graph: from drawn masks on, no method leaves the graph that torch compiles of it."""

import pytest
import torch
from fake_gpu import loaded
from prepared_methods import prepared
from recipes import ROOT, SETTINGS
from tiers import fast

from mim.randomness import RowGenerator


@pytest.fixture(autouse=True)
def _graphs_start_anew(monkeypatch):
    monkeypatch.chdir(ROOT)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def drawn(name):
    """A method whose masks and shared random numbers are drawn already, as they are on the CPU; and its batch."""
    method, data = prepared(name)
    crops, labels, keys = loaded(data, method.encoder.img_size, 2)
    rows = method.row_generator(len(labels), 0)
    shares = rows.common(4)
    once = {"row_generator": lambda *_: Drawn(rows.keys, shares)}
    masking = method.masking
    if hasattr(method, "draw_masks") and not masking.guided:
        mask = method.draw_masks(len(labels), None, 0)
        once["draw_masks"] = lambda *_: mask
    elif hasattr(masking, "blocks"):
        blocks = method.draw(len(labels), 0)
        once["draw"] = lambda *_: blocks
    elif masking is not None and not masking.guided:
        mask = masking(len(labels), method.encoder.grid, progress=method.progress, generator=rows)
        masking.forward = lambda *_, **__: mask
    for attribute, value in once.items():
        setattr(method, attribute, value)
    return method, (data.views(crops, RowGenerator(keys)), labels)


class Drawn(RowGenerator):
    """Numbers that all rows share come from a hash of the step, which is no tensor; here they are given."""

    def __init__(self, keys, shares):
        super().__init__(keys)
        self.shares = shares

    def views(self, count):
        return Drawn(RowGenerator(self.keys).views(count).keys, self.shares)

    def common(self, count):
        return self.shares[:count]


def losses(name, backend):
    """Loss and gradient norm of a step as it is, and of the same step compiled to one graph, or none if it has two."""
    method, batch = drawn(name)
    found = []
    for step in (method.training_step, torch.compile(method.training_step, backend=backend, fullgraph=True)):
        method.zero_grad()
        torch.manual_seed(0)  # drop path
        loss = step(batch, 0)
        loss.backward()
        gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
        found.append((loss.detach(), torch.nn.utils.get_total_norm(gradients)))
    return found


@pytest.mark.parametrize("name", fast(SETTINGS, ()))
def test_a_step_is_one_graph(name):
    plain, compiled = losses(name, "eager")
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_compiled_for_the_cpu_has_the_loss_and_the_gradient_of_one_that_is_not(name):
    plain, compiled = losses(name, "inductor")
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)

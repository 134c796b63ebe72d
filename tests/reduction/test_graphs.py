"""Static reductions as one graph: compiled without a break, exported for any batch size, and as ONNX."""

import pytest
import torch
from small_models import EVERY, REDUCTIONS, build

from mim.reduction import KeepRate, TokenReducedViT

CASES = [("registers", name) for name in EVERY]
CASES += [("DINOv3", "ToMe"), ("DINOv3", "fused"), ("rotary per head", "rejoined")]


@pytest.fixture(params=CASES, ids=" ".join)
def wrapper(request):
    torch._dynamo.reset()
    model, name = request.param
    return TokenReducedViT(build(model), EVERY[name]()).eval().requires_grad_(False)


@pytest.mark.slow
def test_every_reduction_compiles_to_one_graph(wrapper, images):
    compiled = torch.compile(wrapper, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), wrapper(images))
    torch.testing.assert_close(compiled(images[:2]), wrapper(images[:2]))


@pytest.mark.slow
def test_generated_code_gives_the_same_numbers(images):
    """Once for all: the others differ in what they compose, not in what a compiler sees."""
    torch._dynamo.reset()
    wrapper = TokenReducedViT(build("registers"), REDUCTIONS["fused mean"](KeepRate(0.6))).eval().requires_grad_(False)
    compiled = torch.compile(wrapper, fullgraph=True, backend="inductor")
    torch.testing.assert_close(compiled(images), wrapper(images), rtol=1e-4, atol=1e-4)


def test_tome_compiles_to_one_graph_in_the_fast_suite(images):
    torch._dynamo.reset()
    wrapper = TokenReducedViT(build("plain"), REDUCTIONS["ToMe"](KeepRate(0.6))).eval().requires_grad_(False)
    compiled = torch.compile(wrapper, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), wrapper(images))


@pytest.mark.slow
def test_a_reduced_model_exports_for_any_batch_size(wrapper, images):
    graph = torch.export.export(wrapper, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (images, torch.randn(5, 3, 40, 40)):
        torch.testing.assert_close(graph.module()(batch), wrapper(batch))


@pytest.mark.slow
def test_onnx_gives_the_same_numbers(wrapper, images, tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx.reference")
    graph = torch.export.export(wrapper, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.onnx.export(graph, (), tmp_path / "vit.onnx", input_names=["images"], external_data=False, verbose=False)
    batch = torch.randn(2, 3, 40, 40)
    (logits,) = onnx.ReferenceEvaluator(str(tmp_path / "vit.onnx")).run(None, {"images": batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), wrapper(batch), rtol=1e-4, atol=1e-4)

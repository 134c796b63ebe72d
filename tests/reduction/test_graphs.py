"""Static reductions as one graph: compiled without a break, exported for any batch size, and as ONNX."""

import pytest
import torch
from small_models import REDUCTIONS, TRAINED, build

from mim.reduction import KeepRate, TokenReducedViT


@pytest.fixture(params=[*REDUCTIONS, *TRAINED])
def wrapper(request):
    torch._dynamo.reset()
    name = request.param
    reduction = TRAINED[name]() if name in TRAINED else REDUCTIONS[name](KeepRate(0.6))
    return TokenReducedViT(build("registers"), reduction).eval().requires_grad_(False)


@pytest.mark.slow
def test_it_compiles_to_one_graph(wrapper, images):
    compiled = torch.compile(wrapper, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), wrapper(images))
    torch.testing.assert_close(compiled(images[:2]), wrapper(images[:2]))


@pytest.mark.slow
def test_it_exports_for_any_batch_size(wrapper, images):
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

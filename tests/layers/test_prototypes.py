"""Points of a head lie on a sphere, in whatever precision the head computes."""

import pytest
import torch

from mim.layers.prototypes import Head


@pytest.mark.parametrize("shared", [True, False, "nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_points_have_length_one_in_float32_under_autocast_too(shared, dtype):
    head = Head(16, 8, 32, 24, shared)
    classes, patches = torch.randn(5, 16), torch.randn(7, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        of_classes, of_patches = head.of_both(classes, patches)
        prototypes = head.for_patches()
    for points in (of_classes, of_patches):
        torch.testing.assert_close(points.norm(dim=-1), torch.ones(len(points)), rtol=0, atol=1e-6)
    assert prototypes.dtype == torch.float32
    torch.testing.assert_close(prototypes.norm(dim=-1), torch.ones(8), rtol=0, atol=1e-6)

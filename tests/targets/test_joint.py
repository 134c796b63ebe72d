import pytest
import torch

from mim.encoder import Encoder
from mim.targets import HOGTarget, JointTarget, PixelTarget

GRID, PLACES = (4, 4), torch.tensor([[0, 5], [3, 9]])


@pytest.fixture
def joint():
    target = JointTarget([HOGTarget(), PixelTarget()], [1.0, 0.25])
    assert target.dim(Encoder("test_vit", 32, 8)) == 108 + 192
    return target


@pytest.mark.parametrize("nodata", [False, True])
def test_the_loss_is_the_weighted_sum_of_the_losses_of_each(joint, nodata):
    images, valid = torch.randn(2, 3, 32, 32), torch.ones(2, 1, 32, 32, dtype=torch.bool)
    valid[0, :, :8, :6] = valid[1, :, :2, 24:26] = False
    known = valid if nodata else None
    target, weights = joint.measured(images, GRID, PLACES, known)
    prediction, expected = torch.randn(2, 2, 300), torch.zeros(())
    for part, own, share in ((slice(108), HOGTarget(), 1.0), (slice(108, 300), PixelTarget(), 0.25)):
        wanted, counted = own.measured(images, GRID, PLACES, known)
        torch.testing.assert_close(target[..., part], wanted)
        expected = expected + share * own.loss(prediction[..., part], wanted, counted)
    torch.testing.assert_close(joint.loss(prediction, target, weights), expected)
    assert joint.errors(prediction, target, weights).shape == (2, 2)


def test_pictures_are_those_of_all_targets(joint):
    images, prediction = torch.randn(2, 3, 32, 32), torch.randn(2, 2, 300)
    shown = joint.pictures(prediction, images, GRID, PLACES)
    alone = PixelTarget().pictures(prediction[..., 108:], images, GRID, PLACES)
    assert list(shown) == ["hidden", "edges", "imagined edges", "reconstruction"]
    torch.testing.assert_close(shown["reconstruction"], alone["reconstruction"])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="one above 0 for each of the 2 targets"):
        JointTarget([HOGTarget(), PixelTarget()], weights)
    with pytest.raises(ValueError, match="two or more"):
        JointTarget([HOGTarget()])

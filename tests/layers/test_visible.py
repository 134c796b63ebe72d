from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mim.layers.visible import BatchNorm, enlarged, move_statistics, only_visible, unknown_layers, visible_statistics


def holed(channels: int = 3) -> tuple[Tensor, Tensor]:
    visible = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).view(3, 1, 1, 2)
    shown = enlarged(visible, (2, 4))
    return torch.randn(3, channels, 2, 4) * shown, shown


def test_statistics_are_those_of_a_loop_over_visible_places() -> None:
    x, visible = holed()
    places = torch.stack([x[b, :, i, j] for b, _, i, j in visible.nonzero().tolist()])  # (M, C)
    count, mean, var = visible_statistics(x, visible)
    assert count == len(places) == 16
    torch.testing.assert_close(mean, places.mean(0))
    torch.testing.assert_close(var, places.var(0, correction=0))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_visible_places_is_torchs_on_their_list(training: bool) -> None:
    x, visible = holed()
    norm, torchs = BatchNorm(3).train(training), nn.BatchNorm1d(3).train(training)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    torchs.load_state_dict(norm.state_dict())
    out, shown = norm(x, visible), visible[:, 0].bool()
    torch.testing.assert_close(out.movedim(1, 3)[shown], torchs(x.movedim(1, 3)[shown]))
    assert not out.movedim(1, 3)[~shown].any()
    move_statistics(norm, unless=torch.tensor(data=False))
    for name, value in torchs.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value)


def test_batch_statistics_that_are_refused_move_nothing() -> None:
    norm = BatchNorm(3)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(torch.full((2, 3, 2, 2), torch.nan))
    move_statistics(norm, unless=torch.tensor(data=True))
    move_statistics(norm, unless=torch.tensor(data=False))  # they are forgotten, too
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_layers_get_their_own_forward_back_even_after_an_error() -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    with pytest.raises(RuntimeError), only_visible(net, torch.ones(1, 1, 1, 1)):
        net(torch.zeros(1, 5, 2, 2))
    assert all("forward" not in vars(layer) for layer in net)


def test_a_layer_that_looks_at_the_whole_image_is_named() -> None:
    assert unknown_layers(nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1))) == ["AdaptiveAvgPool2d"]

import math

import pytest
import torch
from fake_gpu import CUDA, machine
from grouped import grouped

from mim.layers.koleo import koleo


def slow(tokens):
    points = [point / point.norm() for point in tokens]
    nearest = [min((a - b).norm() for j, b in enumerate(points) if j != i) for i, a in enumerate(points)]
    return -sum(distance.log() for distance in nearest) / len(points)


def test_it_equals_a_slow_loop_over_pairs_and_ignores_lengths():
    tokens = torch.randn(9, 5)
    torch.testing.assert_close(koleo(tokens), slow(tokens))
    torch.testing.assert_close(koleo(tokens * torch.rand(9, 1)), koleo(tokens))


def test_a_step_down_its_gradient_moves_neighbours_apart():
    tokens = torch.randn(9, 5, requires_grad=True)
    koleo(tokens).backward()
    assert koleo(tokens.detach() - 0.01 * tokens.grad) < koleo(tokens)


def test_a_token_and_its_copy_do_not_push_each_other():
    tokens = torch.randn(1, 5).repeat(2, 1).requires_grad_()
    loss = koleo(tokens)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-6))
    assert not tokens.grad.any()


def gradients(rank, tokens, neighbours):
    own = tokens.chunk(2)[rank].clone().requires_grad_()
    loss = koleo(own, neighbours)
    loss.backward()
    return loss.item(), own.grad.numpy()


def test_two_processes_equal_one_where_neighbours_are_those_of_the_batch():
    tokens = torch.randn(8, 5, requires_grad=True)
    losses, parts = zip(*grouped(lambda rank: gradients(rank, tokens.detach(), "batch")), strict=True)
    loss = koleo(tokens)
    loss.backward()
    assert sum(losses) / 2 == pytest.approx(loss.item(), rel=1e-5)
    # A process's gradient is that of the sum of both losses, of which a run takes the mean.
    torch.testing.assert_close(torch.cat([torch.from_numpy(part) for part in parts]) / 2, tokens.grad)


def test_neighbours_of_a_process_are_its_own():
    tokens = torch.randn(8, 5)
    losses = [loss for loss, _ in grouped(lambda rank: gradients(rank, tokens, "process"))]
    assert losses == pytest.approx([koleo(part).item() for part in tokens.chunk(2)])


def test_it_is_single_precision_under_autocast_and_never_waits_for_the_device():
    tokens = torch.randn(9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(koleo(tokens), koleo(tokens.clone()))
        assert koleo(tokens.bfloat16()).dtype == torch.float32
    with machine():
        koleo(torch.empty(9, 5, device=CUDA))

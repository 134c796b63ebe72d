import pytest
import torch
from fake_gpu import CUDA, machine
from grouped import grouped

from mim.layers.sinkhorn import sinkhorn


def slow(logits, temperature, turns=3):
    """DINOv2's: prototypes x tokens, rows to 1 / K, columns to 1 / B, and times B at the end."""
    table = (logits.double() / temperature).exp().T
    table = table / table.sum()
    rows, columns = table.shape
    for _ in range(turns):
        for row in range(rows):
            table[row] /= table[row].sum() * rows
        for column in range(columns):
            table[:, column] /= table[:, column].sum() * columns
    return (table * columns).T.float()


@pytest.mark.parametrize("turns", [1, 3])
def test_it_equals_a_slow_loop_over_rows_and_columns(turns):
    logits = torch.randn(11, 5)
    torch.testing.assert_close(sinkhorn(logits, 0.5, iterations=turns), slow(logits, 0.5, turns))


def test_tokens_sum_to_one_and_prototypes_are_used_alike_after_many_turns():
    assignments = sinkhorn(torch.randn(40, 8) + torch.arange(8.0), 0.3, iterations=200)
    torch.testing.assert_close(assignments.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(assignments.sum(dim=0), torch.full((8,), 5.0), rtol=1e-4, atol=0)


def test_each_place_is_balanced_apart_from_all_others():
    logits = torch.randn(9, 4, 6)
    places = [sinkhorn(logits[:, place], 0.2) for place in range(4)]
    torch.testing.assert_close(sinkhorn(logits, 0.2), torch.stack(places, dim=1))


@pytest.mark.parametrize("shape", [(10, 6), (10, 3, 6)])
def test_rows_that_do_not_count_change_nothing_and_are_finite(shape):
    logits = torch.randn(shape)
    counted = torch.arange(10) % 3 > 0
    logits[~counted] *= 100
    given = sinkhorn(logits, 0.2, counted.view(-1, *[1] * (len(shape) - 2)).expand(shape[:-1]))
    torch.testing.assert_close(given[counted], sinkhorn(logits[counted], 0.2))
    torch.testing.assert_close(given.sum(dim=-1), torch.ones(shape[:-1]))


def test_logits_far_apart_stay_finite_and_each_token_keeps_a_sum_of_one():
    logits = torch.randn(6, 4) * torch.logspace(0, 4, 6)[:, None] + torch.tensor([0.0, 0.0, 0.0, -1e5])
    assignments = sinkhorn(logits, 0.04)
    assert assignments.isfinite().all()
    torch.testing.assert_close(assignments.sum(dim=1), torch.ones(6))


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_token_at_all_gives_no_assignment_or_rows_without_meaning(tokens):
    assignments = sinkhorn(torch.randn(tokens, 4), 0.1, torch.zeros(tokens, dtype=torch.bool))
    assert assignments.shape == (tokens, 4)
    assert assignments.isfinite().all()


@pytest.mark.parametrize("shares", [(7, 5), (12, 0)])
@pytest.mark.parametrize("places", [(), (3,)])
def test_two_processes_with_unequal_shares_equal_one(places, shares):
    logits = torch.randn(12, *places, 6)
    parts = logits.split(shares)
    apart = grouped(lambda rank: sinkhorn(parts[rank], 0.2).numpy())
    together = torch.cat([torch.from_numpy(part) for part in apart])
    torch.testing.assert_close(together, sinkhorn(logits, 0.2))


def test_it_is_single_precision_under_autocast():
    logits = torch.randn(12, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assignments = sinkhorn(logits, 0.1)
    assert torch.equal(assignments, sinkhorn(logits, 0.1))
    assert assignments.dtype == torch.float32


def test_it_never_waits_for_the_device_and_gives_no_gradient():
    with machine():
        logits = torch.empty(8, 3, 5, device=CUDA, requires_grad=True)
        assignments = sinkhorn(logits, 0.1, torch.empty(8, 3, dtype=torch.bool, device=CUDA))
    assert assignments.shape == (8, 3, 5)
    assert not assignments.requires_grad

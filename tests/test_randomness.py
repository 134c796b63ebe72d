"""Random numbers are a function of their key, whatever surrounds them."""

import torch

from mim.randomness import RowGenerator, derive_seed, keyed_generator


def rows(first, count, seed=7):
    return RowGenerator.for_rows(seed, first, count)


def test_a_seed_depends_on_every_part_of_its_key():
    keys = [
        (0, "crop", 1),
        (0, "crop", 2),
        (0, "order", 1),
        (1, "crop", 1),
        ("0", "crop", 1),
        (0, "crop"),
        (0, 1, "crop"),
    ]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_a_seed_is_the_same_in_every_process_and_release():
    assert derive_seed(0, "order", 3) == 386106667988085106


def test_seeds_fit_what_torch_takes():
    assert all(0 <= derive_seed(number) < 2**63 for number in range(1000))


def test_a_keyed_generator_ignores_and_leaves_the_global_one():
    before = torch.get_rng_state()
    first = torch.rand(4, generator=keyed_generator(1, "probe"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(torch.rand(4, generator=keyed_generator(1, "probe")), first)


def test_a_row_draws_the_same_numbers_in_any_batch():
    whole, parts = rows(0, 12), [rows(0, 5), rows(5, 1), rows(6, 6)]
    for shape in [(7,), (2, 3), ()]:  # later draws, too
        assert torch.equal(whole.rand(*shape), torch.cat([part.rand(*shape) for part in parts]))


def test_the_shape_comes_after_the_rows():
    assert rows(0, 5).rand(2, 3).shape == (5, 2, 3)
    assert rows(0, 5).rand().shape == (5,)


def test_one_draw_of_many_equals_many_draws():
    one, many = rows(3, 4), rows(3, 4)
    assert torch.equal(one.rand(6), torch.cat([many.rand(2) for _ in range(3)], 1))


def test_numbers_lie_in_the_unit_interval_and_are_uniform():
    numbers = rows(0, 1000).rand(200)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 100, 0, 1)
    chi_square = ((counts - 2000) ** 2 / 2000).sum().item()
    assert chi_square < 149  # 0.999 quantile with 99 degrees of freedom


def test_rows_and_draws_are_uncorrelated():
    numbers = rows(0, 400).rand(400).double() - 0.5
    for shifted in [(numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1]), (numbers, numbers.T)]:
        correlation = (shifted[0] * shifted[1]).mean().item() * 12
        assert abs(correlation) < 0.011  # 4.4 standard errors of 160 000 products


def test_no_row_is_repeated_over_ranks_micro_batches_and_steps():
    def draw(step):
        return rows(0, 1000, derive_seed(0, "rows", step)).rand(4)

    numbers = torch.cat([draw(step) for step in range(30)])
    assert len(numbers.unique(dim=0)) == len(numbers)


def test_a_row_does_not_meet_its_neighbour_later_in_the_sequence():
    numbers = rows(0, 200).rand(200).flatten()
    assert len(numbers.unique()) > 0.997 * len(numbers)  # 24 bits leave 48 chance pairs


def test_big_seeds_and_rows_wrap_without_harm():
    numbers = RowGenerator.for_rows(2**63 - 2, 0, 4).rand(50)
    assert numbers.isfinite().all()
    assert len(numbers.unique(dim=0)) == 4


def test_common_numbers_are_the_same_in_every_part_of_a_batch_and_in_all_views():
    parts = [rows(0, 5), rows(5, 3), rows(0, 8).views(2)]
    numbers = [part.common(2) + part.common(1) for part in parts]
    assert numbers[0] == numbers[1] == numbers[2]
    assert len(set(numbers[0])) == 3
    assert all(0 <= number < 1 for number in numbers[0])
    assert rows(0, 5, seed=8).common(3) != numbers[0]


def test_views_of_a_row_have_numbers_of_their_own_that_depend_on_the_row_alone():
    whole, part = rows(0, 6).views(2).rand(4), rows(2, 2).views(2).rand(4)
    assert torch.equal(part, whole[[2, 3, 8, 9]])
    assert len(whole.unique(dim=0)) == 12


def test_no_numbers_at_all_are_numbers_of_every_row():
    assert RowGenerator.for_rows(0, 0, 3, torch.device("cpu")).rand(0).shape == (3, 0)

import math

import pytest
import torch

from mim.layers.decoding import Decoding, _gumbel, decode_iteratively
from mim.randomness import RowGenerator


def rows(count=2, seed=0):
    return RowGenerator.for_rows(seed, 0, count)


def table(codes=5, places=16):
    """Logits that depend on the place and on how much is known."""
    logits = torch.randn(places, codes, generator=torch.Generator().manual_seed(0))
    return lambda ids, hidden: logits.expand(len(ids), -1, -1) * (1 + hidden.float().mean(1))[:, None, None]


def counted(places, steps):
    """How many ids are hidden whenever the network is asked."""
    asked = []

    def predict(ids, hidden):
        asked.append(int(hidden.sum()))
        return torch.zeros(1, places, 3)

    ids, hidden = torch.zeros(1, places, dtype=torch.long), torch.ones(1, places).bool()
    decode_iteratively(predict, ids, hidden, rows(1), Decoding(steps))
    return asked


def test_hidden_ids_grow_fewer_as_the_cosine_says():
    assert counted(256, 8) == [256, 251, 236, 212, 181, 142, 97, 49]


def test_at_least_one_id_becomes_known_in_a_step_however_many_there_are():
    assert counted(4, 12)[:5] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(("schedule", "temperature"), [("cosine", 4.5), ("linear", 0.0), ("square", 1.0)])
def test_the_sampler_equals_a_slow_loop(schedule, temperature):
    predict, steps, ids = table(), 5, torch.randint(5, (2, 16))
    hidden = torch.rand(2, 16) < 0.8
    share = {"cosine": lambda d: math.cos(d * math.pi / 2), "linear": lambda d: 1 - d, "square": lambda d: 1 - d * d}
    generator, slow, left = rows(), ids.tolist(), [set(row.nonzero()[:, 0].tolist()) for row in hidden]
    asked = [len(row) for row in left]
    for step in range(1, steps + 1):
        now = torch.tensor([[place in row for place in range(16)] for row in left])
        scores = predict(torch.tensor(slow), now).log_softmax(-1)
        noise = _gumbel(generator, 16, 5)
        confident = [{} for _ in left]
        for image, row in enumerate(left):
            for place in row:
                slow[image][place] = max(
                    range(5), key=lambda v: float(scores[image, place, v] + noise[image, place, v])
                )
                confident[image][place] = float(scores[image, place, slow[image][place]])
        if step == steps:
            break
        noise = _gumbel(generator, 16)
        for image, row in enumerate(left):
            count = min(max(1, int(asked[image] * share[schedule](step / steps))), len(row) - 1)
            own = {
                p: c + temperature * (1 - step / steps) * float(noise[image, p]) for p, c in confident[image].items()
            }
            left[image] = set(sorted(own, key=own.get)[:count])
    decoding = Decoding(steps, temperature, schedule)
    assert decode_iteratively(predict, ids, hidden, rows(), decoding).tolist() == slow


def test_known_ids_never_change_and_hidden_ones_are_not_read():
    predict, ids, hidden = table(), torch.randint(5, (2, 16)), torch.rand(2, 16) < 0.5
    first = decode_iteratively(predict, ids, hidden, rows())
    assert torch.equal(first[~hidden], ids[~hidden])
    assert torch.equal(decode_iteratively(predict, ids.masked_fill(hidden, 4), hidden, rows()), first)


def test_an_image_is_a_function_of_seed_and_row():
    predict, ids, hidden = table(), torch.zeros(3, 16, dtype=torch.long), torch.ones(3, 16).bool()
    whole = decode_iteratively(predict, ids, hidden, rows(3))
    assert torch.equal(decode_iteratively(predict, ids[:2], hidden[:2], rows(2)), whole[:2])
    assert not torch.equal(decode_iteratively(predict, ids, hidden, rows(3, seed=1)), whole)


def test_one_step_draws_every_id_by_its_weight():
    weights = torch.tensor([0.6, 0.3, 0.1])
    drawn = decode_iteratively(
        lambda ids, hidden: weights.log().expand(1, 20000, 3),
        torch.zeros(1, 20000, dtype=torch.long),
        torch.ones(1, 20000).bool(),
        rows(1),
        Decoding(steps=1),
    )
    torch.testing.assert_close(drawn[0].bincount() / 20000, weights, atol=0.015, rtol=0)

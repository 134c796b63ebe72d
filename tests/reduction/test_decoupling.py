import pytest
import torch
import torch.nn.functional as F
from small_models import build

from mim.reduction import Counts, DecoupleAndMerge, Tokens
from mim.reduction.attention import Attending
from mim.reduction.decoupling import density_peaks
from mim.reduction.merging import best_pairs


def slow_peaks(points, count, neighbours):
    """Density peaks of one cloud in loops."""
    size = len(points)
    distance = [[((a - b) ** 2).mean().item() for b in points] for a in points]
    density = [-sum(sorted(row)[:neighbours]) / neighbours for row in distance]
    gap = []
    for i in range(size):
        denser = [distance[i][j] for j in range(size) if density[j] > density[i]]
        gap.append(min(denser) if denser else max(map(max, distance)))
    score = [torch.tensor(density[i]).exp().item() * gap[i] ** 0.5 for i in range(size)]
    centres = sorted(sorted(range(size), key=lambda i: -score[i])[:count])
    nearest = {i: min(range(count), key=lambda c: distance[i][centres[c]]) for i in range(size) if i not in centres}
    return centres, nearest


def test_clusters_are_those_of_a_slow_loop():
    points = torch.randn(3, 14, 6)
    centres, others, nearest = density_peaks(points, 4, neighbours=3)
    for row in range(3):
        expected, places = slow_peaks(points[row], 4, 3)
        assert centres[row].tolist() == expected
        assert dict(zip(others[row].tolist(), nearest[row].tolist(), strict=True)) == places


def test_of_equal_points_the_first_is_the_densest():
    centres, others, nearest = density_peaks(torch.ones(1, 5, 2), 2)
    assert sorted([*centres[0].tolist(), *others[0].tolist()]) == list(range(5))
    assert nearest.shape == (1, 3)


def test_attentive_tokens_pair_up_and_the_others_cluster_by_attention():
    block, x = build("plain").blocks[0], torch.randn(2, 1 + 20, 16)
    attending = Attending(block, 1)
    middle = attending.half(x)
    reduction = DecoupleAndMerge(Counts([10]), clusters=0.3, pairs=0.2)
    tokens = reduction.reduce(Tokens.start(middle, 1), attending, 10, 0)
    assert reduction._parts(20, 10) == (9, 3, 2)
    attention, keys = attending.class_attention(), F.normalize(attending.mean_keys(), dim=-1)
    for row in range(2):
        order = attention[row].argsort(descending=True).tolist()
        attentive, rest = sorted(order[:9]), sorted(order[9:])
        centre, source, target = (part[0].tolist() for part in best_pairs(keys[row, attentive][None], 2))
        groups = [
            [attentive[c], *(attentive[s] for s, t in zip(source, target, strict=True) if t == i)]
            for i, c in enumerate(centre)
        ]
        peaks, nearest = slow_peaks(middle[row, 1:][rest], 3, 5)
        groups += [[rest[p], *(rest[n] for n, c in nearest.items() if c == i)] for i, p in enumerate(peaks)]
        for slot, group in enumerate(groups):
            weight = attention[row, group] if group[0] in rest else torch.ones(len(group))
            expected = (weight[:, None] * middle[row, 1:][group]).sum(0) / weight.sum()
            torch.testing.assert_close(tokens.patches[row, slot], expected)
            assert all(tokens.assign[row, n] == slot for n in group)


def test_shares_must_leave_room_for_each_other():
    with pytest.raises(ValueError, match="two shares"):
        DecoupleAndMerge(Counts([1]), clusters=0.8, pairs=0.3)

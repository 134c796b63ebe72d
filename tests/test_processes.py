import pytest

from mim.processes import process_rank

NAMES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


@pytest.mark.parametrize(
    ("given", "rank"),
    [({}, 0), ({"LOCAL_RANK": "1"}, 1), ({"SLURM_PROCID": "3"}, 3), (dict(zip(NAMES, "520", strict=True)), 5)],
)
def test_the_rank_is_what_the_launcher_says(monkeypatch, given, rank):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert process_rank() == rank

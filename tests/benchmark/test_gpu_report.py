"""The report of a GPU: every part within its time, none ends the others, and all of it at toy size without a GPU."""

import json
import time

import pytest
import torch

from mim.benchmark import gpu_report as report
from mim.benchmark.gpu_parts import Bench, NotHereError
from mim.benchmark.gpu_report import Part, markdown, take_all
from mim.benchmark.training import MatrixPeak
from mim.cli import main


@pytest.fixture
def bench(tmp_path):
    device = torch.device("cpu")
    return Bench(device, "32-true", tmp_path, MatrixPeak(device, "32-true", 16, 16), None, 0, seconds=1.0)


def fine(bench):
    yield {"rate": 2.0}


def broken(bench):
    yield {"rate": 1.0}
    raise ValueError("of a kind")


def endless(bench):
    yield {"rate": 3.0}
    time.sleep(60)


def absent(bench):
    raise NotHereError("there is none")
    yield


def test_a_part_that_fails_is_named_keeps_its_rows_and_does_not_end_the_others(bench):
    chosen = [Part(m.__name__, 0.25, m) for m in (broken, absent, fine)]
    take_all(chosen, bench, 60, lambda part: None)
    assert [part.status for part in chosen] == ["failed", "not here", "done"]
    assert [part.why for part in chosen] == ["ValueError: of a kind", "there is none", ""]
    assert [part.rows for part in chosen] == [[{"rate": 1.0}], [], [{"rate": 2.0}]]


def test_a_part_is_cut_when_its_time_is_over_and_the_next_one_has_its_own(bench):
    chosen = [Part("endless", 0.1, endless), Part("fine", 0.9, fine)]
    take_all(chosen, bench, 2, lambda part: None)
    assert [part.status for part in chosen] == ["out of time", "done"]
    assert chosen[0].rows == [{"rate": 3.0}]
    assert chosen[0].seconds < 30


def test_what_a_part_leaves_over_is_for_those_after_it(bench, monkeypatch):
    limits = []
    monkeypatch.setattr(Part, "take", lambda self, bench, limit: limits.append(round(limit)))
    take_all([Part("a", 0.2, fine), Part("b", 0.8, fine)], bench, 100, lambda part: None)
    assert limits == [20, 100]


def test_all_parts_together_take_less_than_eight_minutes(bench):
    assert sum(part.share for part in report.parts(bench)) <= 1
    assert report.SECONDS < 480


def test_the_table_has_a_heading_for_each_kind_of_row(bench):
    chosen = [Part("a", 0.1, fine), Part("b", 0.1, fine), Part("c", 0.1, broken)]
    take_all(chosen, bench, 60, lambda part: None)
    assert markdown({"device": "cpu"}, chosen).splitlines()[3:-1] == [
        "| part | rate |",
        "|---|---|",
        "| a | 2 |",
        "| b | 2 |",
        "",
        "| part | rate | not done |",
        "|---|---|---|",
        "| c | 1 | failed: ValueError: of a kind |",
        "",
    ]


def test_the_report_names_what_is_not_done_and_ends_with_a_failure_of_the_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "parts", lambda bench: [Part("bad", 0.1, broken), Part("good", 0.1, fine)])
    assert main("benchmark", ["--gpu_report", "--device=cpu", f"--json={tmp_path}/gpu.json"]) == 4
    assert "1 of 2 parts are not done: bad" in capsys.readouterr().err
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert [(part["name"], part["status"]) for part in told["parts"]] == [("bad", "failed"), ("good", "done")]
    assert "| good | 2 |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("option", ["--compile", "--rounds=3", "--config=hpm/default", "--img_size=64"])
def test_the_report_refuses_what_it_would_ignore(option, capsys):
    assert main("benchmark", ["--gpu_report", option]) == 2
    assert "--gpu_report has recipes and sizes of its own" in capsys.readouterr().err


@pytest.mark.slow
def test_every_part_runs_at_toy_size_without_a_gpu(tmp_path):
    assert main("benchmark", ["--gpu_report", "--device=cpu", f"--json={tmp_path}/gpu.json"]) == 0
    told = json.loads((tmp_path / "gpu.json").read_text())
    status = {part["name"]: part["status"] for part in told["parts"]}
    assert {name for name, found in status.items() if found != "done"} == {"CUDA graph"}
    assert all(part["rows"] for part in told["parts"] if part["status"] == "done")

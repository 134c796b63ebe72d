"""A trace of some steps, with the parts of a step by name, that changes nothing of the run."""

import itertools
import json

import pytest
from recipes import ROOT, SETTINGS

from mim.callbacks.profile import Ranges
from mim.cli import main


@pytest.fixture(autouse=True)
def _paths_start_at_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def train(out, name="ibot", *options):
    short = [
        "--epochs=0.1",
        "--eval_every=100",
        "--save_every=100",
        "--pictures=0",
        "--probe_images=60",
        f"--out={out}",
    ]
    return main("pretrain", [*SETTINGS[name], "--batch_size=16", *short, *options])


@pytest.mark.middle
def test_a_trace_names_the_parts_of_as_many_steps_as_were_asked_for_and_changes_no_number(tmp_path, capsys):
    assert train(tmp_path / "plain") == 0
    assert train(tmp_path / "traced", "ibot", "--profile=2", "--log=[]") == 0
    assert f"trace    {tmp_path}/traced/trace.json" in capsys.readouterr().out
    events = json.loads((tmp_path / "traced" / "trace.json").read_text())["traceEvents"]
    names = ("data", "views", "forward", "backward", "optimizer", "teacher")
    spans = {
        name: sorted(
            (event["ts"], event["ts"] + event["dur"])
            for event in events
            if event.get("name") == name and event.get("cat") == "user_annotation"
        )
        for name in names
    }
    assert {name: len(found) for name, found in spans.items()} == dict.fromkeys(names, 2)
    order = [span for step in range(2) for span in (spans[name][step] for name in names)]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(order))
    same = [(tmp_path / run / "metrics.csv").read_bytes() for run in ("plain", "traced")]
    assert same[0] == same[1]
    assert not (tmp_path / "plain" / "trace.json").exists()


def test_a_trace_of_more_steps_than_there_are_is_refused(tmp_path, capsys):
    assert train(tmp_path / "run", "mae", "--profile=500") == 2
    printed = capsys.readouterr().err
    assert "--profile 500: the run is too short" in printed
    assert not (tmp_path / "run").exists()


def test_a_range_is_closed_by_its_own_end_alone():
    ranges = Ranges()
    ranges.start("[LightningModule]MAE.on_before_optimizer_step")
    ranges.stop("[Strategy]SingleDeviceStrategy.backward")
    assert [name for name, _ in ranges._open] == ["optimizer"]
    ranges.stop("[LightningModule]MAE.optimizer_step")
    assert ranges._open == []

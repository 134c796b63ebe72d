"""The table of metrics: appended to, cut back on resume, exact to the last bit."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from mim.callbacks.run_log import MetricsTable, RunLog, duration
from mim.encoder import Encoder
from mim.masking import RandomMasking
from mim.methods import Method, NonFiniteError, OptimConfig, Plan
from mim.run.folder import RunFolder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def test_rows_are_steps_and_columns_are_metrics(path):
    table = MetricsTable(path)
    table.add(10, 0.5, {"train/loss": 0.25})
    table.add(20, 1.0, {"train/loss": 0.125})
    assert path.read_text().splitlines() == ["step,epoch,train/loss", "10,0.5,0.25", "20,1.0,0.125"]


def test_a_row_with_known_columns_is_appended(path):
    table = MetricsTable(path)
    table.add(10, 0.5, {"loss": 0.25})
    inode, size = path.stat().st_ino, path.stat().st_size
    table.add(20, 1.0, {"loss": 0.125})
    assert path.stat().st_ino == inode  # not written anew: a long run's table grows to megabytes
    assert path.stat().st_size > size


def test_a_new_metric_adds_a_column_and_leaves_the_rows_before_empty(path):
    table = MetricsTable(path)
    table.add(10, 0.5, {"loss": 0.25})
    table.add(20, 1.0, {"knn": 0.75})
    assert path.read_text().splitlines() == ["step,epoch,loss,knn", "10,0.5,0.25,", "20,1.0,,0.75"]


def test_values_of_one_step_share_a_row(path):
    table = MetricsTable(path)
    table.add(10, 0.5, {"loss": 0.25})
    table.add(10, 0.5, {"knn": 0.75})
    assert path.read_text().splitlines() == ["step,epoch,loss,knn", "10,0.5,0.25,0.75"]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-300, -0.0, 5e-324, float(torch.tensor(0.1)), math.inf, math.nan])
def test_numbers_come_back_to_the_last_bit(path, value):
    MetricsTable(path).add(1, 0.0, {"loss": value})
    back = MetricsTable(path).last("loss")
    assert back.hex() == value.hex()


def test_a_reopened_table_goes_on_where_it_ended(path):
    values = [random.Random(0).random() for _ in range(4)]
    whole, parts = MetricsTable(path.with_name("whole.csv")), [MetricsTable(path)]
    for step, value in enumerate(values):
        if step == 2:
            parts.append(MetricsTable(path))
        for table in (whole, parts[-1]):
            table.add(step, step / 3, {"loss": value})
    assert path.read_text() == path.with_name("whole.csv").read_text()


def test_rows_beyond_the_checkpoint_are_forgotten(path):
    table = MetricsTable(path)
    for step in (10, 20, 30):
        table.add(step, 0.0, {"loss": step / 8})
    MetricsTable(path).forget_after(20)
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", "10", "20"]


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_line_that_was_cut_does_not_survive_a_resume(path, cut):
    table = MetricsTable(path)
    table.add(10, 0.5, {"loss": 0.25})
    table.add(20, 1.0, {"loss": 0.0625})
    before = path.read_bytes()
    table.add(30, 1.5, {"loss": 0.125})
    path.write_bytes(path.read_bytes()[:-cut])
    resumed = MetricsTable(path)
    resumed.forget_after(20)
    assert path.read_bytes() == before
    resumed.add(30, 1.5, {"loss": 0.125})
    assert path.read_bytes() == before + b"30,1.5,0.125\r\n"


def test_the_last_value_of_a_metric_skips_empty_cells(path):
    table = MetricsTable(path)
    table.add(10, 0.5, {"loss": 0.25, "knn": 0.5})
    table.add(20, 1.0, {"loss": 0.125})
    assert (table.last("knn"), table.last("loss"), table.last("linear")) == (0.5, 0.125, None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (8, "8s"),
        (59.7, "1m 00s"),
        (723, "12m 03s"),
        (3599.6, "1h 00m"),
        (20_460, "5h 41m"),
        (90_000, "25h 00m"),
    ],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


# The callback --------------------------------------------------------------------------------------------------------


class Silent(Method):
    pass


def trainer_at(step, max_steps=6, **metrics):
    return SimpleNamespace(
        global_step=step,
        max_steps=max_steps,
        is_global_zero=True,
        callback_metrics={name: torch.tensor(value) for name, value in metrics.items()},
        strategy=SimpleNamespace(reduce=lambda value: value),
        loggers=[],
        train_dataloader=None,
    )


@pytest.fixture
def method():
    method = Silent(Encoder("test_vit", 16, 8), RandomMasking(), OptimConfig())
    method.plan = Plan(max_steps=6, steps_per_epoch=4, batch_size=8)
    return method


def run(log, method, steps, micro_batches=1, first=0):
    log.on_train_start(trainer_at(first), method)
    for step in steps:
        for micro in range(micro_batches):
            trainer = trainer_at(step if micro + 1 == micro_batches else step - 1, loss=step / 8)
            log.on_train_batch_start(trainer, method, None, 0)
            log.on_train_batch_end(trainer, method, None, None, 0)


def steps_of(table):
    return list(MetricsTable(table.path).rows)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_row_comes_every_so_many_steps_and_after_the_last(tmp_path, method, micro_batches):
    log = RunLog(RunFolder(tmp_path), every=4)
    run(log, method, range(1, 7), micro_batches)
    assert steps_of(log.metrics) == steps_of(log.timing) == [4, 6]


def test_a_row_holds_what_the_method_logged_and_the_rate_that_the_step_used(tmp_path, method):
    log = RunLog(RunFolder(tmp_path), every=1)
    run(log, method, range(1, 3))
    row = MetricsTable(log.metrics.path).rows[2]
    assert float(row["loss"]) == 2 / 8
    assert float(row["epoch"]) == 2 / 4
    assert float(row["train/lr"]) == method.learning_rate(1)


def test_metrics_of_an_interrupted_run_equal_those_of_a_whole_one(tmp_path, method):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    run(RunLog(RunFolder(tmp_path / "whole"), every=1), method, range(1, 7))
    run(RunLog(RunFolder(tmp_path / "parts"), every=1), method, range(1, 6))
    run(RunLog(RunFolder(tmp_path / "parts"), every=1), method, range(4, 7), first=3)
    whole, parts = ((tmp_path / name / "metrics.csv").read_bytes() for name in ("whole", "parts"))
    assert parts == whole


def test_speeds_stand_apart_from_what_repeats_exactly(tmp_path, method):
    log = RunLog(RunFolder(tmp_path), every=1)
    run(log, method, range(1, 3))
    assert set(MetricsTable(log.timing.path).columns) == {"step", "epoch", "images_per_second", "data_wait"}
    assert not set(MetricsTable(log.metrics.path).columns) & {"images_per_second", "data_wait"}


def test_pauses_do_not_slow_the_speed_down(tmp_path, method, monkeypatch):
    log, clock = RunLog(RunFolder(tmp_path), every=2), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    log.on_train_start(trainer_at(0), method)
    for step in (1, 2):
        clock[0] += 0.25  # waiting for data
        log.on_train_batch_start(trainer_at(step - 1), method, None, 0)
        clock[0] += 0.75  # computing
        log.on_train_batch_end(trainer_at(step, loss=0.5), method, None, None, 0)
        if step == 1:
            with log.paused():
                clock[0] += 100
    assert log.timing.last("images_per_second") == 8.0  # 16 images in 2 seconds
    assert log.timing.last("data_wait") == 0.25


def test_a_nonfinite_step_is_noticed_before_a_row_is_written(tmp_path, method):
    log = RunLog(RunFolder(tmp_path), every=1)
    method.nonfinite_step.fill_(0)
    with pytest.raises(NonFiniteError):
        run(log, method, [1])
    assert steps_of(log.metrics) == []


def test_other_processes_write_nothing(tmp_path, method):
    log, trainer = RunLog(RunFolder(tmp_path), every=1), trainer_at(1, loss=0.5)
    trainer.is_global_zero = False
    log.on_train_start(trainer, method)
    trainer.global_step = 2
    log.on_train_batch_end(trainer, method, None, None, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_waiting_loader_is_named_once(tmp_path, method, monkeypatch, capsys):
    log, clock = RunLog(RunFolder(tmp_path), every=1), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    log.on_train_start(trainer_at(0, max_steps=30), method)
    for step in range(1, 31):
        clock[0] += 0.5
        log.on_train_batch_start(trainer_at(step - 1), method, None, 0)
        clock[0] += 0.5
        log.on_train_batch_end(trainer_at(step, max_steps=30, loss=0.5), method, None, None, 0)
    assert capsys.readouterr().out.count("loader is the bottleneck (50% waiting)") == 1


def test_what_a_method_finds_wrong_is_said_once(tmp_path, method, monkeypatch, capsys):
    monkeypatch.setattr(Silent, "health_warning", lambda self, values: "all is one", raising=True)
    run(RunLog(RunFolder(tmp_path), 1), method, range(1, 5))
    assert capsys.readouterr().out.count("health  all is one") == 1

"""Config files from strangers: nothing is imported or run, nothing takes long, every mistake is three short lines."""

import time
from pathlib import Path

import pytest

from mim.cli import main
from mim.errors import UserError
from mim.run.config import instantiate, parse, run_options

TINY = (Path(__file__).parents[1] / "tiny.yaml").read_text()


def laughs(levels):
    """Aliases of aliases: ten to the power of ``levels`` texts in a few hundred bytes."""
    rows = ["a0: &a0 [" + ", ".join(["ha"] * 10) + "]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(rows)


def replaced(old, new):
    assert old in TINY
    return TINY.replace(old, new)


POLICY, DATA = "{class_path: RandomMasking}", "data: {path: shapes, batch_size: 16, num_workers: 0}"
FILES = {
    "billion laughs": TINY + laughs(9),
    "an alias of itself": TINY + "x: &x [*x]",
    "a model of itself": "model: &m {class_path: MAE, init_args: *m}",
    "megabytes": TINY + "\n".join(f"k{i}: {i}" for i in range(50_000)),
    "a long line": TINY + "q: " + "x" * 500_000,
    "deep": TINY + "q: " + "[" * 3000 + "]" * 3000,
    "deep and cut": TINY + "q: " + "{a: " * 50_000,
    "zero bytes": "\0\1\2",
    "tabs": "\tmodel:\n",
    "code": TINY + "x: !!python/object/apply:os.mkdir [executed]\n",
    "code as key": "? !!python/object/apply:os.mkdir [executed]\n: 3\n",
    "a number as key": TINY + "3: 4\n",
    "a policy that is a list": replaced(POLICY, "[1]"),
    "a policy that is a number": replaced(POLICY, "3"),
    "a policy that is code": replaced("RandomMasking", "os.mkdir"),
    "a policy of another kind": replaced("RandomMasking", "PixelTarget"),
    "a policy that needs scores": replaced("RandomMasking", "AttentionMasking"),
    "a ratio that is text": replaced(POLICY, "{class_path: RandomMasking, init_args: {ratio: much}}"),
    "a ratio above 1": replaced(POLICY, "{class_path: RandomMasking, init_args: {ratio: 1.5}}"),
    "an optimizer that is a list": replaced("optim: {blr: 1.0e-2, warmup_epochs: 0.05}", "optim: [1]"),
    "a rate that is a list": replaced("blr: 1.0e-2", "blr: [fast]"),
    "a rate that is no number": replaced("blr: 1.0e-2", "blr: .nan"),
    "data that are a list": replaced(DATA, "data: [1, 2]"),
    "no images in a batch": replaced("batch_size: 16", "batch_size: 0"),
    "fewer than no images": replaced("batch_size: 16", "batch_size: -16"),
    "a huge number": replaced("batch_size: 16", "batch_size: " + "9" * 400),
    "fewer than no workers": replaced("num_workers: 0", "num_workers: -1"),
    "a mean of one channel": replaced("num_workers: 0", "num_workers: 0, mean: [0.5]"),
    "a spread of nothing": replaced("num_workers: 0", "num_workers: 0, std: [0, 0, 0]"),
    "endless": replaced("epochs: 0.375", "epochs: .inf"),
    "backwards": replaced("epochs: 0.375", "epochs: -3"),
    "no log": replaced("log_every: 1", "log_every: 0"),
    "no threads": replaced("threads: 1", "threads: 0"),
    "fewer than no pictures": replaced("pictures: 2", "pictures: -2"),
    "a boundless model": replaced("positions: sincos", "kwargs: {embed_dim: 1000000000000}"),
    "an argument that is unknown": replaced("positions: sincos", "kwargs: {command: os.mkdir}"),
    "a strategy that is code": TINY + "trainer: {strategy: {class_path: os.mkdir, init_args: {path: executed}}}",
    "a strategy that is unknown": TINY + "trainer: {strategy: os.mkdir}",
    "no micro-batches": TINY + "trainer: {accumulate_grad_batches: 0}",
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES.keys())
def test_a_hostile_config_ends_in_three_short_lines_at_once(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    start = time.process_time()
    assert main("pretrain", ["--config", "mine.yaml", "--out", "run", "--trainer.accelerator", "cpu"]) == 2
    assert time.process_time() - start < 5
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 3
    assert max(map(len, lines)) < 520
    assert not Path("executed").exists()
    assert not Path("run/checkpoints").exists()


@pytest.mark.parametrize("command", ["knn", "linear_probe", "finetune", "segment", "export"])
@pytest.mark.parametrize("name", ["billion laughs", "deep", "code", "megabytes"])
def test_other_commands_look_at_configs_as_closely(command, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(FILES[name])
    assert main(command, ["--config", "mine.yaml"]) == 2
    assert len(capsys.readouterr().err.splitlines()) <= 3
    assert not Path("executed").exists()


def test_a_policy_of_the_wrong_type_is_answered_in_plain_words(tmp_path):
    (tmp_path / "mine.yaml").write_text(FILES["a policy that is a number"])
    with pytest.raises(UserError) as mistake:
        parse([f"--config={tmp_path / 'mine.yaml'}"])
    assert str(mistake.value).splitlines()[:2] == [
        "error: --model.masking cannot be 3",
        "why:   not a valid subclass of Masking",
    ]


def test_a_number_outside_its_range_is_named_wherever_it_stands(tmp_path):
    (tmp_path / "mine.yaml").write_text(TINY.replace("img_size: 32", "img_size: 0"))
    with pytest.raises(UserError) as mistake:
        parse([f"--config={tmp_path / 'mine.yaml'}"])
    assert str(mistake.value).splitlines()[0] == "error: --model.encoder.img_size cannot be 0"


def test_the_recipe_that_the_hostile_ones_are_made_from_is_fine(tmp_path):
    (tmp_path / "mine.yaml").write_text(TINY)
    config = parse([f"--config={tmp_path / 'mine.yaml'}"])
    run_options(config)
    instantiate(config)

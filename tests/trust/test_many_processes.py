"""Several processes: the same result as one, an end for all when one dies, and no image lost or seen twice."""

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from recipes import ROOT, SETTINGS
from strikes import checkpoints, family, finish, orphans, start, wait_for_steps

pytestmark = pytest.mark.slow
CPU = ["--trainer.accelerator", "cpu"]
ONE = ["--devices", "1", "--strategy", "auto", *CPU]
TWO = ["--devices", "2", "--strategy", "ddp", *CPU]
FOUR = ["--devices", "4", "--strategy", "ddp", *CPU]
SHARDED = ["--devices", "2", "--strategy", "fsdp", *CPU]
EXACT = ["--model.init_args.encoder.drop_path_rate", "0"]
STEPS_100 = ["--epochs", "1.5625", "--save_every", "0.5", "--eval_every", "1"]
FREE = (".attn.qkv.bias", "difficulty.norm.bias", "difficulty.predict.bias")
"""Weights that cannot change the loss: their gradient is rounding noise, which AdamW blows up to whole steps."""
KEYS_VALUES = ".attn.keys_values.bias"
"""Of cross-attention: keys are first, and their bias cannot change the loss either."""


def names(value):
    return {tuple(ONE): "one", tuple(TWO): "two", tuple(FOUR): "four", tuple(SHARDED): "two sharded"}.get(tuple(value))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process, each made once."""
    folder = tmp_path_factory.mktemp("alone")

    def run(method, *settings):
        path = folder / f"{method}-{zlib.crc32(' '.join(settings).encode()):x}"  # settings may be long
        if not path.exists():
            status, output = finish(*SETTINGS[method], *EXACT, *settings, "--out", path)
            assert status == 0, output
        return path

    return run


def assert_equal_up_to_rounding(run, other, centers=5e-6):
    """Every parameter and buffer to 2e-6, in float32; sums are taken in another order, so bit-equality cannot be.

    Centres, which are means of logits, to ``centers``: a logit adds up the differences of hundreds of weights.
    """
    one, two = (torch.load(checkpoints(folder)[-1], weights_only=True)["state_dict"] for folder in (run, other))
    assert one.keys() == two.keys()
    for name, value in one.items():
        counterpart = two[name]
        if name.endswith(FREE[0]):
            value, counterpart = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (value, counterpart))
        if name.endswith(KEYS_VALUES):
            value, counterpart = value.chunk(2)[1], counterpart.chunk(2)[1]
        if not name.endswith(FREE[1:]):
            limit = centers if name == "centers" else 2e-6
            torch.testing.assert_close(
                value, counterpart, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("processes", [TWO, SHARDED], ids=names)
@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize(
    ("steps", "centers"),
    [pytest.param([], 5e-6, marks=pytest.mark.middle, id="12 or 24"), pytest.param(STEPS_100, 1e-5, id="100")],
)
def test_two_processes_equal_one_with_the_same_global_batch(steps, centers, method, processes, alone, tmp_path):
    status, output = finish(*SETTINGS[method], *EXACT, *steps, *processes, "--out", tmp_path / "two")
    assert status == 0, output
    assert_equal_up_to_rounding(alone(method, *steps), tmp_path / "two", centers)


ROTARY = ["--model", "vit_small_patch16_rope_mixed_224", "--model.init_args.encoder.positions", "learned"]
ROTARY += ["--model.init_args.encoder.kwargs", '{"depth": 2, "embed_dim": 32, "num_heads": 2}']
GENTLE = ["--model.init_args.optim.head_warmup", "0.25", "--model.init_args.optim.layer_decay", "0.5"]
GENTLE += [f"--model.init_args.optim.anchor.{term}=0.5" for term in ("weights", "gram", "features")]


@pytest.mark.parametrize("processes", [TWO, SHARDED], ids=names)
@pytest.mark.parametrize("method", ["mae", "hpm", "attmask"])
def test_two_processes_equal_one_on_a_rotary_vit_that_first_stands_still_and_is_anchored(
    method, processes, alone, tmp_path
):
    status, output = finish(*SETTINGS[method], *EXACT, *ROTARY, *GENTLE, *processes, "--out", tmp_path / "two")
    assert status == 0, output
    assert_equal_up_to_rounding(alone(method, *ROTARY, *GENTLE), tmp_path / "two")


def test_a_sharded_run_exports_the_whole_backbone(tmp_path):
    """The teacher of iBOT, as plain timm loads it, is the teacher of the last checkpoint."""
    status, output = finish(*SETTINGS["ibot"], *SHARDED, "--out", tmp_path / "run")
    assert status == 0, output
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export' / 'backbone'}", pretrained=True)
    state = torch.load(checkpoints(tmp_path / "run")[-1], weights_only=True)["state_dict"]
    exported = [name for name in state if name.startswith("teacher.module.encoder.vit.")]
    assert len(exported) == len(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[f"teacher.module.encoder.vit.{name}"]), name


@pytest.mark.parametrize(
    ("before", "after"),
    [(ONE, TWO), (TWO, ONE), (TWO, FOUR), (ONE, SHARDED), (SHARDED, ONE), (TWO, SHARDED)],
    ids=names,
)
def test_a_run_goes_on_with_other_processes(before, after, alone, tmp_path):
    """100 steps in all, of the method with most state; stopped by a signal somewhere in the first half."""
    run = tmp_path / "run"
    process = start(*SETTINGS["attmask"], *EXACT, *STEPS_100, *before, "--out", run)
    wait_for_steps(process, 4)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    status, output = finish("--resume", run, *after)
    assert status == 0, output
    assert_equal_up_to_rounding(alone("attmask", *STEPS_100), run)


@pytest.mark.parametrize("processes", [ONE, TWO], ids=names)
def test_no_image_of_uneven_shards_is_lost_or_seen_twice(processes, tmp_path):
    """37 images in shards of 20 and 17, in batches of 8: nothing divides by anything."""
    for shard, numbers in enumerate([range(20), range(20, 37)]):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as file:
            for number in numbers:
                content = io.BytesIO()
                Image.new("RGB", (40, 36), (number, 0, 255 - number)).save(content, "PNG")
                info = tarfile.TarInfo(f"{number:02}.png")
                info.size = content.tell()
                file.addfile(info, io.BytesIO(content.getvalue()))
    counted = tmp_path / "counted.txt"
    settings = ["--data", tmp_path / "train-{0..1}.tar", "--batch_size", "8", "--epochs", "2", "--num_workers", "2"]
    status, output = finish(
        *SETTINGS["mae"],
        *settings,
        *processes,
        "--out",
        tmp_path / "run",
        env={"COUNTED": str(counted)},
        script="tests/trust/counted.py",
    )
    assert status == 0, output
    seen = Counter(line.split()[0] for line in counted.read_text().splitlines())
    assert seen == {"0": 37, "1": 9 * 8 - 37}  # nine steps are two epochs, rounded
    assert max(Counter(counted.read_text().splitlines()).values()) == 1


@pytest.mark.parametrize("processes", [TWO, SHARDED], ids=names)
@pytest.mark.parametrize("who", [0, 1], ids=["the first", "the second"])
def test_a_process_that_is_killed_ends_all_within_a_minute(who, processes, tmp_path):
    process = start(*SETTINGS["attmask"], *processes, "--epochs", "50", "--save_every", "1", "--out", tmp_path / "run")
    wait_for_steps(process, 2)
    kin = family(process.pid)
    began = time.monotonic()
    os.kill([process.pid, kin[0]][who], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0, output
    assert orphans(kin, patience=60 - (time.monotonic() - began)) == []
    if who == 1:  # the first one watches over the others
        assert re.search(r"process 1 of 2 died \(killed by SIGKILL\)|\[rank: 1\] .* terminated with code -9", output)
        assert "Traceback" not in output


@pytest.mark.parametrize("processes", [TWO, SHARDED], ids=names)
def test_a_nan_in_one_of_them_stops_all_and_leaves_one_dump(processes, tmp_path):
    run = tmp_path / "run"
    status, output = finish(*SETTINGS["mae"], *processes, "--out", run, script="tests/trust/poisoned.py")
    assert status == 3, output
    assert output.count("error: not finite at step 3") == output.count("error: ") == 1
    assert "Traceback" not in output
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    dump = torch.load(run / "debug" / "nan_step_000002.pt", weights_only=True)
    assert (dump["processes"], len(dump["names"])) == (2, 16)
    assert all(value.isfinite().all() for value in dump["state_dict"].values())


@pytest.mark.parametrize("processes", [TWO, SHARDED], ids=names)
@pytest.mark.parametrize("to", ["all", "the first", "the second"])
def test_a_signal_to_any_of_them_saves_and_ends_with_75(to, processes, tmp_path):
    process = start(*SETTINGS["mae"], *processes, "--epochs", "5", "--save_every", "5", "--out", tmp_path / "run")
    wait_for_steps(process, 3)
    ranks = {"all": [process.pid, *family(process.pid)[:1]], "the first": [process.pid]}
    for pid in ranks.get(to, family(process.pid)[:1]):
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75, output
    assert len(checkpoints(tmp_path / "run")) == 1


@pytest.mark.parametrize("processes", [TWO, SHARDED], ids=names)
def test_a_full_disk_ends_all_in_three_lines(processes, tmp_path):
    process = start(*SETTINGS["mae"], *processes, "--epochs", "5", "--save_every", "1", "--out", tmp_path / "run")
    wait_for_steps(process, 3)
    kin = family(process.pid)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 4, output
    assert [line[:7] for line in output.splitlines()[-3:]] == ["error: ", "why:   ", "try:   "]
    assert "Traceback" not in output
    assert orphans(kin) == []


def command_of(pid):
    """How a process was started, as one line; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


@pytest.mark.parametrize("processes", [TWO, SHARDED], ids=names)
@pytest.mark.parametrize("seconds", [0, 1, 3, 6, 10])
def test_a_signal_to_all_while_they_meet_ends_all_with_75_and_the_run_starts_again(seconds, processes, alone, tmp_path):
    """From the moment in which the second process is there to the first steps: imports, group, loaders, callbacks."""
    args = [*SETTINGS["mae"], *EXACT, *processes, "--out", tmp_path / "run", "--resume", "auto"]
    process = start(*args)
    while not (kin := [pid for pid in family(process.pid) if str(ROOT / "tools" / "pretrain.py") in command_of(pid)]):
        time.sleep(0.01)
    time.sleep(seconds)
    for pid in (process.pid, *kin):
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75, output
    assert orphans(kin, patience=5) == []
    assert not re.search("Traceback|Error", output), output
    status, output = finish(*args)
    assert status == 0, output
    assert_equal_up_to_rounding(alone("mae"), tmp_path / "run")


def test_torchrun_starts_the_same_run(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = [*SETTINGS["mae"], *TWO, "--out", str(tmp_path / "run")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "tools/pretrain.py", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run" / "report.html").exists()


def test_slurm_tasks_become_the_processes_of_one_run(alone, tmp_path):
    """Two tasks with the variables that ``srun`` gives to them; there is no SLURM here."""
    common = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NAME": "mim"}
    common |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": str(10_000 + os.getpid() % 10_000)}
    common |= {"SLURM_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1"}
    args = [*SETTINGS["mae"], *EXACT, *TWO, "--out", tmp_path / "run", "--resume", "auto"]
    tasks = [start(*args, env=common | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in "01"]
    outputs = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert_equal_up_to_rounding(alone("mae"), tmp_path / "run")

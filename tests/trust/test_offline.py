"""Nothing reaches for the network: no line of code could, no import does, and no default run either."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mim.cli import COMMANDS

ROOT = Path(__file__).parents[2]
# Told by the interpreter itself, whoever does it: our code, torch, Lightning or timm.
SPY = """
import sys
seen = []
def watch(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto") and isinstance(args[1], tuple):  # a string is a pipe
        if args[1][:2] != ("::1", 0):  # how urllib3, where it is installed, finds out whether there is IPv6
            seen.append(f"{event} {args[1]}")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        seen.append(f"{event} {args[0]}")
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork") and WATCH_ALL:
        if "/sbin/ldconfig" not in str(args[0]):  # how the standard library looks for a shared library
            seen.append(f"{event} {args[:1]}")
    elif event == "open" and WATCH_ALL and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        nothing = str(args[0]) == "/dev/null"  # dill asks it for types of files
        if not nothing and not str(args[0]).endswith(".pyc") and "__pycache__" not in str(args[0]):
            seen.append(f"{event} {args[:2]}")
sys.addaudithook(watch)
"""
IMPORT = """
import importlib, pkgutil
import mim
for module in pkgutil.walk_packages(mim.__path__, "mim."):
    if module.name != "mim.__main__":
        importlib.import_module(module.name)
"""
RUN = """
from mim.cli import main
status = main("pretrain", sys.argv[1:])
assert status == 0, status
"""


def spied(code, *args, watch_all):
    script = f"WATCH_ALL = {watch_all}\n{SPY}\n{code}\nsys.exit('\\n'.join(seen) or 0)"
    command = [sys.executable, "-c", script, *map(str, args)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-2000:]


def test_an_import_opens_no_socket_starts_no_process_and_writes_no_file():
    spied(IMPORT, watch_all=True)


@pytest.mark.middle
def test_a_run_opens_no_connection(tmp_path):
    spied(RUN, "--config", "tests/tiny.yaml", "--epochs", "0.05", "--out", tmp_path / "run", watch_all=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ibot", "hpm"])
def test_a_run_of_another_method_with_workers_opens_no_connection(method, tmp_path):
    config = {"ibot": "tests/tiny-ibot.yaml", "hpm": "tests/tiny_hpm.yaml"}[method]
    spied(RUN, "--config", config, "--num_workers", "2", "--out", tmp_path / "run", watch_all=False)


# The folder that the first writes, the run that the third makes, and what the others do with them.
ALL = {
    "make_shapes": "--out shapes-there --train 48 --val 24 --size 32",
    "check_data": "--data shapes-there",
    "pretrain": f"--config {ROOT}/tests/tiny.yaml --num_workers 2 --out run",
    "knn": "--weights run --data shapes --seeds 1 --num_workers 2",
    "linear_probe": "--weights run --data shapes --seeds 1 --epochs 1",
    "finetune": "--weights run --data shapes --seeds 1 --epochs 0.2 --warmup_epochs 0 --from_scratch false",
    "segment": "--weights run --data shapes-there --crop 32 --seeds 1 --steps 2 --warmup_steps 0",
    "visualize": "--weights run --data shapes --images 2",
    "compare": "--runs run,run --images 2 --data shapes",
    "export": "--run run --to onnx --out model.onnx",
    "benchmark": f"--config {ROOT}/tests/tiny.yaml --batch_size 4 --rounds 1 --data shapes",
    "benchmark_reduction": "--reduction tome --shares 0.8 --model test_vit --batch_size 1 --rounds 1",
    "pareto": "--weights run --data shapes --reduction tome --shares 0.8 --batch_size 1 --rounds 1",
    "pareto_finetuned": "--finetuned run --batch_size 1 --rounds 1",
    "info": "run run",
}


@pytest.mark.slow
def test_every_command_works_without_any_network(tmp_path):
    alone = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("a network namespace of one's own is not allowed here")
    assert set(ALL) == set(COMMANDS)
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {"OMP_NUM_THREADS": "1"}
    for command, args in ALL.items():
        result = subprocess.run(
            [*alone, sys.executable, str(ROOT / "tools" / f"{command}.py"), *args.split()],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{command}: {result.stdout[-1000:]}{result.stderr[-2000:]}"

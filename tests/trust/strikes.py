"""Kills, signals and full disks against the real command, and what must be left after them.

    python tests/trust/strikes.py --trials 50 --kills 3 --seed 0

Each trial takes the next recipe, with 0 or 2 workers, with or without accumulation, strikes a tiny run
``--kills`` times, resumes it each time and compares what it ends with, byte for byte, with a run that nobody disturbed.
Every second trial aims: it waits for a checkpoint that is being written. A line for each trial, a summary at the end,
status 1 if any of them failed.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from recipes import ROOT, SAVE_EVERY, SETTINGS

SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGUSR1": signal.SIGUSR1}


def start(*args: object, env: dict[str, str] | None = None, script: str = "tools/pretrain.py") -> subprocess.Popen[str]:
    """The command as a user starts it, in a session of its own."""
    command = [sys.executable, script, *map(str, args)]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (env or {})
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=surroundings, start_new_session=True, **pipe)


def finish(*args: object, timeout: float = 300, **kwargs) -> tuple[int, str]:
    """Status and output of a command that nobody disturbs."""
    process = start(*args, **kwargs)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def wait_for_steps(process: subprocess.Popen[str], count: int) -> list[str]:
    """Reads until ``count`` lines of progress have come, or the process ends; returns what it read."""
    lines, seen = [], 0
    for line in process.stdout:
        lines.append(line)
        seen += " step " in line and "loss" in line
        if seen == count:
            break
    return lines


def drained(process: subprocess.Popen[str]) -> tuple[threading.Thread, list[str]]:
    """Reads the rest of the output beside us, so that a full pipe never stops the process."""
    lines: list[str] = []
    thread = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    thread.start()
    return thread, lines


def family(pid: int) -> list[int]:
    """Processes that descend from ``pid``."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [descendant for child in map(int, children) for descendant in (child, *family(child))]


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def orphans(pids: list[int], patience: float = 10) -> list[int]:
    """Those of ``pids`` that still run after ``patience`` seconds."""
    end = time.monotonic() + patience
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints under a final name, oldest first."""
    return sorted(run.glob("checkpoints/step-*.ckpt"))


def step_of(path: Path) -> int:
    return int(path.stem.split("-")[1])


def unreadable(run: Path) -> list[str]:
    """Checkpoints under a final name that are not what was written; read without this project's code."""
    problems = []
    for path in checkpoints(run):
        try:
            facts = json.loads(path.with_suffix(".json").read_text())
            state = torch.load(path, weights_only=True)
            good = hashlib.sha256(path.read_bytes()).hexdigest() == facts["sha256"]
            if not good or state["global_step"] != step_of(path):
                problems.append(f"{path.name}: other contents")
        except Exception as error:
            problems.append(f"{path.name}: {type(error).__name__}: {error}")
    return problems


def leftovers(run: Path) -> list[Path]:
    """Half-written files of the checkpoint folder."""
    return list(run.glob("checkpoints/.*.tmp"))


def last_row(run: Path) -> int:
    """The last step that ``metrics.csv`` tells of."""
    with (run / "metrics.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if None not in row.values()]
    return int(steps[-1]) if steps else 0


def leaves(tree: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every value of a nested state under its path."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if pairs is None:
        yield name, tree
    for key, value in pairs or ():
        yield from leaves(value, f"{name}.{key}")


def done(run: Path) -> bool:
    """Whether the run came to its end; pictures and report are there before."""
    return (run / "summary.json").is_file() and json.loads((run / "summary.json").read_text())["status"] == "done"


def final_state(run: Path) -> dict[str, object]:
    """What the last checkpoint holds."""
    return torch.load(checkpoints(run)[-1], weights_only=True)


def differences(run: Path, other: Path) -> list[str]:
    """What is not equal to the bit in two finished runs: state of the last checkpoint, metrics, exported weights."""
    first, second = (dict(leaves(final_state(folder))) for folder in (run, other))
    found = [f"{name} is in one of them" for name in first.keys() ^ second.keys()]
    for name in first.keys() & second.keys():
        mine, theirs = first[name], second[name]
        if isinstance(mine, torch.Tensor):
            same = mine.dtype == theirs.dtype and mine.numpy().tobytes() == theirs.numpy().tobytes()
        else:
            same = mine == theirs
        found += [] if same else [name]
    for file in ("metrics.csv", "export/backbone/model.safetensors"):
        found += [file] if (run / file).read_bytes() != (other / file).read_bytes() else []
    return found


@dataclass
class Trial:
    """A run that is struck and resumed until it is done.

    Args:
        method: key of ``SETTINGS``.
        folder: for the runs.
        workers: loader processes.
        accumulate: micro-batches.
        aimed: strike while a checkpoint is being written.
        number: the signal to strike with.
        extra: further arguments of the command.
    """

    method: str
    folder: Path
    workers: int = 0
    accumulate: int = 1
    aimed: bool = False
    number: signal.Signals = signal.SIGKILL
    extra: tuple[str, ...] = ()
    redone: int = 0
    hits: int = 0
    statuses: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def settings(self) -> list[str]:
        accumulate = ["--accumulate", str(self.accumulate)] if self.accumulate > 1 else []
        return [*SETTINGS[self.method], *self.extra, *accumulate]

    def whole(self) -> Path:
        """An undisturbed run of the same settings, made once."""
        run = self.folder / f"whole-{self.method}-{self.accumulate}-{zlib.crc32(' '.join(self.extra).encode()):x}"
        if not done(run):
            status, output = finish(*self.settings, "--out", run)
            assert status == 0, output
        return run

    def play(self, kills: int, chance: random.Random) -> None:
        """Strikes, resumes, compares."""
        whole = self.whole()
        run = Path(tempfile.mkdtemp(prefix=f"{self.method}-", dir=self.folder)) / "run"
        # Another file system than that of the run, as in many containers.
        env = {"TMPDIR": "/dev/shm"} if chance.random() < 0.5 else {}
        args = [*self.settings, "--out", run, "--resume", "auto", "--num_workers", self.workers]
        for _ in range(kills):
            process = start(*args, env=env)
            if not self.strike(process, run, chance):
                break
            # The number of workers is free to change.
            args = ["--resume", "auto", "--out", run, "--num_workers", chance.choice((0, self.workers))]
        if not done(run):
            status, output = finish(*args, env=env)
            if status != 0:
                self.problems.append(f"ended with {status}: {output[-800:]}")
                return
        self.problems += differences(whole, run)
        self.problems += [f"left behind: {path.name}" for path in leftovers(run)]

    def strike(self, process: subprocess.Popen[str], run: Path, chance: random.Random) -> bool:
        """Sends the signal at its moment and takes stock; False if the run was done before."""
        said = wait_for_steps(process, chance.randint(1, 6))
        thread, rest = drained(process)
        if self.aimed:
            self.wait_for_save(process, run, chance)
        else:
            time.sleep(chance.random() * 0.1)
        kin = family(process.pid)
        if process.poll() == 0:
            return False
        process.send_signal(self.number)
        status = process.wait(timeout=120)
        self.statuses.append(status)
        thread.join(timeout=10)
        if status == 0:  # done in the moment of the strike
            return False
        expected = -signal.SIGKILL if self.number == signal.SIGKILL else 75
        if status != expected:
            self.problems.append(f"struck, ended with {status}: {''.join(said + rest)[-800:]}")
        self.problems += [f"orphan {pid}" for pid in orphans(kin)]
        self.problems += unreadable(run)
        self.hits += bool(leftovers(run))
        if len(leftovers(run)) > 1:
            self.problems.append(f"{len(leftovers(run))} half-written files")
        saved = step_of(checkpoints(run)[-1]) if checkpoints(run) else 0
        # A kill may hit between the end of a step and its checkpoint.
        allowed = SAVE_EVERY if self.number == signal.SIGKILL else 0
        if last_row(run) - saved > allowed:
            self.problems.append(f"{last_row(run) - saved} steps to redo")
        self.redone = max(self.redone, last_row(run) - saved)
        return True

    def wait_for_save(self, process: subprocess.Popen[str], run: Path, chance: random.Random) -> None:
        """Returns somewhere in the middle of a checkpoint's being written."""
        folder, depth = run / "checkpoints", chance.random() * 0.01
        while process.poll() is None:
            try:
                names = os.listdir(folder)
            except OSError:
                continue
            if any(name.endswith(".tmp") for name in names):
                time.sleep(depth)
                return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["SIGKILL", *SIGNALS], default="SIGKILL")
    parser.add_argument("--methods", default=",".join(SETTINGS))
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="strikes-"))
    folder.mkdir(parents=True, exist_ok=True)
    chance, methods, trials = random.Random(options.seed), options.methods.split(","), []
    started = time.monotonic()
    for number in range(options.trials):
        trial = Trial(
            methods[number % len(methods)],
            folder,
            workers=chance.choice((0, 2)),
            accumulate=chance.choice((1, 2)),
            aimed=number // len(methods) % 2 == 1,
            number=getattr(signal, options.signal),
        )
        trial.play(options.kills, chance)
        trials.append(trial)
        facts = f"{trial.workers} workers, accumulate {trial.accumulate}, {'aimed' if trial.aimed else 'at random'}"
        verdict = "; ".join(trial.problems) or "exact"
        print(f"{number:3} {trial.method:8} {facts}: {verdict} (redone {trial.redone}, hits {trial.hits})", flush=True)
    good = sum(not trial.problems for trial in trials)
    strikes, hits = sum(len(trial.statuses) for trial in trials), sum(trial.hits for trial in trials)
    aimed = sum(len(trial.statuses) for trial in trials if trial.aimed)
    print(
        f"{good} of {len(trials)} trials exact, {strikes} strikes with {options.signal} ({aimed} aimed), "
        f"{hits} left a half-written file, at most {max(trial.redone for trial in trials)} steps redone, "
        f"{(time.monotonic() - started) / 60:.0f} min"
    )
    return int(good < len(trials))


if __name__ == "__main__":
    sys.exit(main())

"""Whether memory, open files and shared memory stay flat over thousands of steps.

    python tests/trust/memory.py --steps 10000 --methods mae,ibot,attmask,hpm

Runs the real command with two loader processes, with probes, pictures and a checkpoint in each of 31 epochs, and reads
resident memory and open files of all its processes from ``/proc`` with every line of progress. A line per method and
process: what it holds a tenth into the run, when everything has been used once, and at the end, and the slope between
of a line through all that was read. Status 1 if one of them is above a MiB per 1,000 steps.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from recipes import SETTINGS
from strikes import family, start

EPOCHS = 31


def watch(method: str, steps: int, workers: int, folder: Path) -> dict[str, list[tuple[int, float, int]]]:
    """(step, resident MiB, open files) of each process over a run; and files of the whole machine's shared memory."""
    rhythm = ["--epochs", steps * 16 / 1024, "--log_every", max(1, steps // 200), "--num_workers", workers]
    rhythm += ["--eval_every", steps * 16 / 1024 / EPOCHS, "--save_every", steps * 16 / 1024 / EPOCHS]
    process = start(*SETTINGS[method], *rhythm, "--out", folder / method)
    seen: dict[str, list[tuple[int, float, int]]] = {}
    lines = []
    for line in process.stdout:
        lines.append(line)
        if not (step := re.search(r" step ([\d,]+)/", line)):
            continue
        number = int(step[1].replace(",", ""))
        for pid in (process.pid, *family(process.pid)):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                files = len(os.listdir(f"/proc/{pid}/fd"))
            except OSError:  # one that made the probes' features, and has just ended
                continue
            who = "training" if pid == process.pid else f"process {pid}"
            seen.setdefault(who, []).append((number, int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, files))
        seen.setdefault("/dev/shm", []).append((number, 0.0, len(os.listdir("/dev/shm"))))
    assert process.wait() == 0, "".join(lines)
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--methods", default=",".join(SETTINGS))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    worst = 0.0
    for method in options.methods.split(","):
        seen = watch(method, options.steps, options.workers, Path(tempfile.mkdtemp(prefix="memory-")))
        for who, rows in seen.items():
            warm = [row for row in rows if row[0] >= options.steps / 10]
            if len(warm) < 10:  # gone after a few lines: it did not last long enough to grow
                continue
            steps, held, files = np.array(warm).T
            half = len(files) // 2
            slope = 1000 * np.polyfit(steps, held, 1)[0]
            worst = max(worst, slope)
            print(
                f"{method:8} {who:14} {held[0]:.1f} MiB at step {steps[0]:.0f}, {held[-1]:.1f} at {steps[-1]:.0f}, "
                f"{slope:+.2f} per 1,000 steps; at most {files[:half].max():.0f} files in the first half, "
                f"{files[half:].max():.0f} in the second",
                flush=True,
            )
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())

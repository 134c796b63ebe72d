"""Whether memory and open files stay flat over thousands of steps.

    python tests/trust/memory.py --steps 2000 --methods mae,ibot,attmask,hpm

Runs the real command, with probes, pictures and a checkpoint in each of the 31 epochs that 2,000 steps are, and reads
its resident memory and open files from ``/proc`` twenty times. A line per method: growth from a quarter of the run,
when everything has been used once, to its end.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

from strikes import SETTINGS, start


def watch(method: str, steps: int, folder: Path) -> tuple[list[tuple[int, int, int]], str]:
    """(step, resident KiB, open files) over a run, and its output."""
    rhythm = ["--epochs", steps * 16 / 1024, "--log_every", 10, "--eval_every", 1, "--save_every", 1]
    process = start(*SETTINGS[method], *rhythm, "--out", folder / method)
    seen, lines = [], []
    for line in process.stdout:
        lines.append(line)
        if step := re.search(r" step (\d+)/", line):
            status = Path(f"/proc/{process.pid}/status").read_text()
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            seen.append((int(step[1]), int(re.search(r"VmRSS:\s+(\d+)", status)[1]), files))
    assert process.wait() == 0, "".join(lines)
    return seen, "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--methods", default=",".join(SETTINGS))
    options = parser.parse_args()
    worst = 0.0
    for method in options.methods.split(","):
        seen, _ = watch(method, options.steps, Path(tempfile.mkdtemp(prefix="memory-")))
        warm = next(row for row in seen if row[0] >= options.steps / 4)
        growth = seen[-1][1] / warm[1] - 1
        worst = max(worst, growth)
        print(
            f"{method:8} step {warm[0]}: {warm[1] / 1024:.0f} MiB, {warm[2]} files; "
            f"step {seen[-1][0]}: {seen[-1][1] / 1024:.0f} MiB ({growth:+.2%}), {seen[-1][2]} files",
            flush=True,
        )
    return int(worst > 0.02)


if __name__ == "__main__":
    sys.exit(main())

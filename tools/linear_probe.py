"""python tools/linear_probe.py --help."""

from mim.cli import main

if __name__ == "__main__":
    raise SystemExit(main("linear_probe"))

"""python tools/sample.py --help."""

from mim.cli import main

if __name__ == "__main__":
    raise SystemExit(main("sample"))

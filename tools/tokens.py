"""python tools/tokens.py --help."""

from mim.cli import main

if __name__ == "__main__":
    raise SystemExit(main("tokens"))

"""python tools/pareto_finetuned.py --help."""

from mim.cli import main

if __name__ == "__main__":
    raise SystemExit(main("pareto_finetuned"))

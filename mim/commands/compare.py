"""Put runs side by side, or train them first: ``python tools/compare.py --methods mae,recipe.yaml --seeds 3``."""

from collections.abc import Mapping
from pathlib import Path

from mim.errors import UserError
from mim.options.outputs import check_folder
from mim.options.ranges import Count, Names, Positive
from mim.run.folder import named_run


def run(
    runs: Names = "",
    methods: Names = "",
    data: str = "builtin",
    epochs: Positive | None = None,
    seeds: Count = 3,
    images: Count = 6,
    out: Path = Path("runs/compare"),
    **pretraining: str,
) -> None:
    """One table with mean and spread, and one page with the same images under every run.

    Args:
        runs: run folders, separated by commas; those whose names differ only after '-seed-' share a row.
        methods: what to train first, with options of pretrain, separated by commas: a method, a method with another
            masking policy as mae+RandomMasking, or a config by its file or name. All see the same images for the same
            number of epochs, and take the same options, such as --in_chans 6.
        data: images to train on.
        epochs: of every training; the recipe's own unless given.
        seeds: trainings of each.
        images: shown on the page.
        out: folder for trainings, compare.html and summary.md.
        pretraining: options of pretrain for every training.
    """
    chosen, wanted = _split(runs), _split(methods)
    if not chosen and not wanted:
        raise UserError("there is nothing to compare", hint=f"{named_run('--runs')}   or   --methods mae")
    check_folder("--out", out)
    folders = [Path(run) for run in chosen]
    for method in wanted:
        folders += [_train(method, data, epochs, seed, out, pretraining) for seed in range(seeds)]
    # torch is imported when there is something to read: --help must not wait for it.
    from mim.run.comparison import collect, curves, strips, tables, write_page

    entries = collect(folders)
    text, markdown, rows = tables(entries)
    print(f"\n{text}\n")
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.md").write_text(markdown, encoding="utf-8")
    write_page(out / "compare.html", rows, strips(entries, images), curves(entries))
    print(f"  table   {out / 'summary.md'}\n  page    {out / 'compare.html'}")


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _train(method: str, data: str, epochs: float | None, seed: int, out: Path, pretraining: Mapping[str, str]) -> Path:
    """Trains, or goes on with what was begun; of a finished training, looks that it was trained like this."""
    from mim.commands.pretrain import main
    from mim.options.pretraining import translate

    name, _, policy = method.partition("+")
    folder = out / f"{Path(name).stem}{f'-{policy}' if policy else ''}-seed-{seed}"
    args = ["--resume" if (folder / "config.yaml").is_file() else "--out", str(folder)]
    args += ["--config", name] if name.endswith((".yaml", ".yml")) or "/" in name else ["--method", name]
    args += ["--data", data, "--seed", str(seed), *(f"--{option}={value}" for option, value in pretraining.items())]
    args += ["--epochs", str(epochs)] if epochs is not None else []
    args += ["--model.init_args.masking", policy] if policy else []
    status = main(translate(args))
    if status:
        raise SystemExit(status)
    return folder

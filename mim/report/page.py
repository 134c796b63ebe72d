"""The report, section by section in reading order."""

import json
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mim.atomic import replaced
from mim.evaluation.features import POOLED
from mim.program import called
from mim.report.advice import advice
from mim.report.charts import chart, seeds
from mim.report.levels import level_chart, level_rows
from mim.report.markup import Html, count, duration, folded, number, percent, section, table, tag
from mim.report.record import KNN, LINEAR, LOSS, LR, RANKME, SPREAD, Run, read_json, read_run, to_float
from mim.report.strips import augmentation, overlay, what_it_sees
from mim.report.style import PAGE, STYLE
from mim.report.tables import spread

PAGE_BYTES = 3_000_000
PICTURE_BYTES = (300_000, 60_000, 8_000)  # of one picture: the first with which the page is small enough
OVERLAYS, BAD_FILES_SHOWN = 6, 20


Values = NDArray[np.float64]
"""Shares of 1, one per seed."""


def write_report(run: Path) -> Path:
    """Writes ``report.html`` into a run folder, finished or still growing; what is not there yet is left out.

    Returns:
        The path of the page, which is replaced as a whole.
    """
    for limit in PICTURE_BYTES:
        page = compose(read_run(run), limit).encode(errors="replace")
        if len(page) <= PAGE_BYTES:
            break
    path = run / "report.html"
    with replaced(path) as aside:
        aside.write_bytes(page)
    return path


def compose(run: Run, limit: int) -> str:
    """The page, with pictures of at most ``limit`` bytes each."""
    sections = [
        headline(run),
        probes(run),
        warnings(run),
        what_it_sees(run, limit),
        curves(run),
        measurements(run),
        *evaluations(run, limit),
        model(run),
        data(run, limit),
        settings(run),
        environment(run),
        use(run),
        notes(run),
    ]
    return PAGE.format(title=escape(run.title), style=STYLE, body="\n".join(filter(None, sections)))


def headline(run: Run) -> Html:
    """What was trained on what, for how long, and the numbers people look for first."""
    summary = run.summary
    facts = [str(summary["data"])] if summary.get("data") else []
    facts += [count(summary[f"{noun}s"], noun) for noun in ("image", "epoch", "step") if summary.get(f"{noun}s")]
    seconds = to_float(summary.get("wall_seconds"))
    facts += [duration(seconds)] if seconds is not None else []
    facts += [str(summary["device"])] if summary.get("device") else []
    status = tag("span", summary["status"], class_="status") if summary.get("status") else ""
    return tag(
        "header",
        tag("p", run.folder.name, status, class_="run"),
        tag("h1", run.title),
        tag("p", " · ".join(facts), class_="lead"),
        tag("dl", *headline_numbers(run), class_="numbers"),
        brevity(run),
    )


SHORT_RUN = 10_000_000  # images seen: a hundredth of what papers train with


def brevity(run: Run) -> Html:
    """What so short a run can show, and what not; nothing beside a long one or one that goes on from weights."""
    images, epochs = to_float(run.summary.get("images")), to_float(run.summary.get("epochs"))
    if images is None or epochs is None or images * epochs >= SHORT_RUN or run.origin != "untrained":
        return Html("")
    return tag(
        "p",
        f"A short run: {images * epochs:,.0f} images seen, where papers train with about a billion. It can show that "
        "features become better than untrained ones, and that nothing collapses. It cannot show which method is best, "
        "and what it imagines of hidden patches stays blurred.",
        class_="lead",
    )


def headline_numbers(run: Run) -> list[Html]:
    """Loss, accuracies beside those of the untrained encoder, health and speed, as far as they are known."""
    first_loss, accuracy = run.first(LOSS), {"knn": ("k-NN top-1", KNN), "linear": ("linear top-1", LINEAR)}
    entries: list[tuple[str, float | None, Callable[[float], str], object]] = [
        ("loss", run.last("loss", LOSS), number, first_loss and f"{number(first_loss)} at the start")
    ]
    for key, (name, metric) in accuracy.items():
        value, untrained, kind = accuracy_of(run, key, metric)
        words = [kind, *([f"{run.origin} {percent(untrained)}"] if untrained is not None else [])]
        entries.append((name, value, percent, ", ".join(filter(None, words))))
    entries.append(("RankMe", run.last("rankme", RANKME), number, "effective dimensions"))
    entries.append(("images per second", to_float(run.summary.get("images_per_second")), number, None))
    return [
        tag("div", tag("dt", name), tag("dd", show(value)), tag("dd", note or "", class_="note"))
        for name, value, show, note in entries
        if value is not None
    ]


def accuracy_of(run: Run, key: str, metric: str) -> tuple[float | None, float | None, str]:
    """What a probe found, the same of the untrained encoder, and on what: the table's numbers if there is one."""
    probe = (run.summary.get("probe") or {}).get(key) or {}
    words = POOLED.get(run.pool or "", "")
    if probe.get("trained") and probe.get("untrained"):
        return float(np.mean(probe["trained"])), float(np.mean(probe["untrained"])), words
    return run.last(key, metric), run.untrained(metric), ", ".join(filter(None, [words, "one split so far"]))


def warnings(run: Run) -> Html:
    """What the measurements warn of."""
    sentences = advice(run)
    return (
        section("What to look at", tag("ul", *(tag("li", sentence) for sentence in sentences)))
        if sentences
        else Html("")
    )


def curves(run: Run) -> Html:
    """The charts everybody looks for, and all other columns folded away."""
    scale = run.epochs_per_step
    charts = [
        chart(
            title, {name: run.metrics[key] for name, key in lines.items() if key in run.metrics}, scale, unit, from_zero
        )
        for title, lines, unit, from_zero in CHARTS
    ]
    named = {key for _, lines, *_ in CHARTS for key in lines.values()}
    rest = sorted(name for name in run.metrics if name not in named)
    health = [chart(readable(name), {name: run.metrics[name]}, scale) for name in rest if name.startswith(HEALTH)]
    others = [chart(name, {name: run.metrics[name]}, scale) for name in rest if not name.startswith(HEALTH)]
    main, signs, more = (
        tag("div", *filter(None, group), class_="charts") if any(group) else "" for group in (charts, health, others)
    )
    titled = [tag("h3", "Health of the method"), signs] if signs else []
    return section("How it went", main, *titled, folded("All other measurements", more))


HEALTH = "health/"


def readable(name: str) -> str:
    """``Class entropy`` for ``health/class_entropy``."""
    return name.removeprefix(HEALTH).replace("_", " ").capitalize()


CHARTS: list[tuple[str, dict[str, str], str, bool]] = [
    ("Loss", {"loss": LOSS}, "", False),
    ("Accuracy of the frozen features on one split", {"k-NN": KNN, "linear": LINEAR}, "%", True),
    ("Learning rate", {"learning rate": LR}, "", True),
    ("RankMe: effective dimensions", {"RankMe": RANKME}, "", True),
    ("Feature spread: 0 collapsed, 1 even", {"spread": SPREAD}, "", True),
]
"""Title, lines by name and column, unit (``%``: the file holds shares of one), whether the axis begins at zero."""


def probes(run: Run) -> Html:
    """Pretrained beside untrained encoder, every seed of every probe."""
    probe = run.summary.get("probe") or {}
    started = {
        PROBES.get(name, name): np.array(result["start"], float)
        for name, result in probe.items()
        if isinstance(result, dict) and result.get("start")
    }
    results = {
        PROBES.get(name, name): (np.array(result["untrained"], float), np.array(result["trained"], float))
        for name, result in probe.items()
        if isinstance(result, dict) and result.get("trained") and result.get("untrained")
    }
    if not results:
        return Html("")
    counts = probe.get("images_per_class") or {}
    runs = max(len(values) for pair in results.values() for values in pair)
    note = PROBE_SEEDS.format(runs) if runs > 1 else "One seed only, so no spread is known."
    return section(
        "What it is worth",
        tag("p", tag("strong", verdict)) if (verdict := _verdict(started, results)) else "",
        worth(run, results, started),
        folded("Images per class", table((name, str(count)) for name, count in counts.items())) if counts else "",
        lead=f"{capitalised(probe.get('protocol', ''))} {note}".strip(),
    )


def capitalised(sentence: str) -> str:
    """The sentence with a capital in front; all others as they are."""
    return sentence[:1].upper() + sentence[1:]


PROBE_SEEDS = (
    "Mean ± standard deviation of {} seeds of the probe: each leaves out other images. "
    "The untrained row draws other weights for each, too. "
    "The model was trained once; another seed of pretraining may differ by more."
)


def worth(run: Run, results: dict[str, tuple[Values, Values]], started: dict[str, Values]) -> Html:
    """A column per kind of score, a row per who was measured."""
    probe, kinds = run.summary.get("probe") or {}, list(results)
    keys = {shown: key for key, shown in PROBES.items()}
    low = min(values.min() for pair in results.values() for values in pair)
    high = max(values.max() for pair in results.values() for values in pair)
    beside = {kind: probe[keys.get(kind, kind)] for kind in kinds}
    best = [run.best(f"val/{keys.get(kind, kind)}_top1") for kind in kinds]
    rows: list[list[object]] = [
        [
            "chance: the commonest class",
            *(percent(own["chance"]) if own.get("chance") else "" for own in beside.values()),
        ],
        ["raw pixels: 8 x 8 thumbnails", *(spread(own.get("pixels") or []) for own in beside.values())],
        ["untrained", *(spread(untrained.tolist()) for untrained, _ in results.values())],
        ["the start", *(spread(started[kind].tolist()) if kind in started else "" for kind in kinds)],
        ["best while learning, one split", *(f"{percent(b[1])}, {run.when(b[0])}" if b else "" for b in best)],
        [tag("strong", "pretrained"), *(tag("strong", spread(trained.tolist())) for _, trained in results.values())],
        [
            "gain over the start" if started else "gain over untrained",
            *(
                f"{100 * (own.mean() - started.get(kind, old).mean()):+.1f} points"
                for kind, (old, own) in results.items()
            ),
        ],
        ["each seed: ○ untrained, ● pretrained", *(seeds(*pair, low, high) for pair in results.values())],
    ]
    return table([row for row in rows if any(row[1:])], head=["top-1", *kinds])


def _verdict(started: dict[str, Values], results: dict[str, tuple[Values, Values]]) -> str:
    """Says so if the weights that the run began with were better than what it made of them."""
    lost = {name: 100 * (start.mean() - results[name][1].mean()) for name, start in started.items() if name in results}
    worse = [f"{name} by {points:.1f} points" for name, points in lost.items() if points > 0]
    return f"The start was better: {', '.join(worse)}. Take that, or train more gently." if worse else ""


PROBES = {
    "knn": "k-NN",
    "linear": "linear",
    "knn_balanced": "k-NN, balanced accuracy",
    "linear_balanced": "linear, balanced accuracy",
}


def measurements(run: Run) -> Html:
    """Every evaluation while the run learnt, the best of each kind in bold."""
    kinds = {title: key for title, key in MEASURED.items() if key in run.metrics}
    steps = sorted({float(step) for key in kinds.values() for step in run.metrics[key][:, 0]})
    if not kinds or len(steps) < 2:
        return Html("")
    losses = run.metrics.get(LOSS, np.zeros((0, 2)))
    rows: list[list[object]] = []
    for step in steps:
        cells: list[object] = [run.when(step) if step else "before"]
        for key in kinds.values():
            found = run.metrics[key][run.metrics[key][:, 0] == step, 1]
            best, shown = run.best(key), percent if key in (KNN, LINEAR) else number
            text = shown(float(found[-1])) if len(found) else ""
            cells.append(tag("strong", text) if text and best and best[0] == step else text)
        near = losses[losses[:, 0] <= step]
        rows.append([*cells, number(float(near[-1, 1])) if len(near) and step else ""])
    content = table(rows, head=["", *kinds, "loss"])
    return folded("Every evaluation, on one split; bold is the best", content)


MEASURED = {"k-NN": KNN, "linear": LINEAR, "RankMe": RANKME, "spread": SPREAD}


def evaluations(run: Run, limit: int) -> list[Html]:
    """A section per later evaluation: ``metrics.json`` with title, protocol and metrics, and pictures beside it."""
    sections = []
    for path in [run.folder / "metrics.json", *sorted(run.folder.glob("evaluation/*/metrics.json"))]:
        content = read_json(path, run.unreadable)
        metrics = content.get("metrics")
        if not isinstance(metrics, dict):
            continue
        pairs = {name: f"{name}, untrained" for name in metrics if f"{name}, untrained" in metrics}
        beside = [(name, spread(metrics[name]), spread(metrics[other])) for name, other in pairs.items()]
        single = {name: value for name, value in metrics.items() if name not in {*pairs, *pairs.values()}}
        plain = [(name, measured(value)) for name, value in single.items() if not isinstance(value, dict)]
        nested = {name: value for name, value in metrics.items() if isinstance(value, dict)}
        details = [
            folded(name, table((key, measured(v)) for key, v in value.items())) for name, value in nested.items()
        ]
        files = sorted(path.parent.glob("*.png"))[:OVERLAYS] if path.parent != run.folder else []
        overlays = tag("div", *filter(None, (overlay(file, run, limit) for file in files)), class_="pair")
        title = str(content.get("title") or path.parent.name)
        numbers = table(beside, head=["", "pretrained", "untrained"]), table(plain)
        sections.append(section(title, *numbers, *details, overlays, lead=str(content.get("protocol") or "")))
    return sections


def measured(value: object) -> str:
    """A metric of an evaluation; a list is one measured several times."""
    if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        deviation = f" ± {np.std(value, ddof=1):.2g} ({len(value)} seeds)" if len(value) > 1 else ""
        return f"{number(float(np.mean(value)))}{deviation}"
    return number(value)


def model(run: Run) -> Html:
    """What was built and what of it is taken home."""
    built = run.summary.get("architecture") or {}
    if not built:
        return Html("")
    (height, width), (rows, columns), patch = built["image"], built["patches"], built["patch"]
    heads = f", {built['heads']} heads" if built.get("heads") else ""
    parts = [
        (name, part["kind"], number(part["parameters"]), number(part["trained"]))
        for name, part in built["parts"].items()
    ]
    facts = [
        ("encoder", f"{built['encoder']}, {built['width']} wide, {built['blocks']} blocks{heads}"),
        ("timm's name", str(run.summary.get("model", ""))),
        ("input", f"{height} x {width} px, {count(built['channels'], 'channel')}"),
        ("patches", f"{patch[0]} x {patch[1]} px: {rows} x {columns} = {rows * columns}"),
        ("mask", built["mask"]),
        ("trained", f"{number(built['trained'])} parameters"),
        ("exported", f"{number(built['exported'])} parameters"),
    ]
    return section("Model", table(facts), table(parts, head=["part", "kind", "parameters", "trained"]))


def settings(run: Run) -> Html:
    """What differs from the defaults, and everything."""
    changed = run.summary.get("changed") or {}
    rows = [(name, tag("strong", written(used)), written(default)) for name, (default, used) in changed.items()]
    everything = folded("Every setting: config.yaml", run.text("config.yaml"))
    return section("Settings", table(rows, head=["changed", "this run", "default"]), everything)


def written(value: object) -> str:
    """A setting as one types it."""
    return value if isinstance(value, str) else json.dumps(value)


def data(run: Run, limit: int) -> Html:
    """How many images and classes there are, what their numbers mean, what is made of them, what could not be read."""
    known = {key: run.summary[key] for key in ("data", "images", "classes", "values") if run.summary.get(key)}
    bad = run.text("bad_files.txt").splitlines()
    rows = [*((key, number(value)) for key, value in known.items()), *([("unreadable files", len(bad))] if bad else [])]
    found = run.summary.get("levels") or {}
    first = "\n".join(bad[:BAD_FILES_SHOWN])
    title = "Unreadable files" if len(bad) <= BAD_FILES_SHOWN else f"The first {BAD_FILES_SHOWN} unreadable files"
    return section(
        "Data", table([*rows, *level_rows(found)]), level_chart(found), augmentation(run, limit), folded(title, first)
    )


def environment(run: Run) -> Html:
    """Machine, versions and state of the code."""
    known = {
        key: run.summary[key]
        for key in ("device", "parameters", "batch_size", "seed", "git")
        if run.summary.get(key) is not None
    }
    versions = run.summary.get("versions") or {}
    rows = [(key.replace("_", " "), number(value)) for key, value in known.items()]
    rows += [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))] if versions else []
    return section("Environment", table(rows), folded("More: env.txt", run.text("env.txt")))


def use(run: Run) -> Html:
    """How to load the result, what to do with it, how to go on and to run it again, and where everything lies."""
    export, command = run.summary.get("export"), run.text("command.txt") or run.summary.get("command")
    parts = []
    if export:
        model = f'model = timm.create_model("local-dir:{export}", pretrained=True)'
        lines = f"import timm\n{model}\nfeatures = model.forward_features(images)"
        parts += [tag("p", "Load it, with nothing but timm:"), tag("pre", lines)]
        parts += [
            tag("p", "Measure it on images with labels, as it was measured here:"),
            tag("pre", next_commands(run)),
        ]
    parts += [tag("p", "Go on where it stopped:"), tag("pre", f"{called('pretrain')} --resume {run.where}")]
    parts += [tag("p", "Run it again:"), tag("pre", command)] if command else []
    return section("Use it", *parts, files(run))


def next_commands(run: Run) -> str:
    """Evaluations of the run with the pool that its probes have used."""
    pool = f" --pool {run.pool}" if run.pool else ""
    given = f"--weights {run.where} --data LABELLED"
    return "\n".join(f"{called(name)} {given}{pool}" for name in ("knn", "linear_probe"))


FILES = {
    "images": "strips of every evaluation",
    "metrics.csv": "all measurements",
    "timing.csv": "speeds",
    "config.yaml": "every setting",
    "log.txt": "what the run said",
    "tensorboard": "for tensorboard --logdir",
    "export/backbone": "the model, a timm folder",
}


def files(run: Run) -> Html:
    """Links to what lies beside the page; they work where the page lies in its folder."""
    there = {name: words for name, words in FILES.items() if (run.folder / name).exists()}
    items = [tag("li", tag("a", name, href=name), f" {words}") for name, words in there.items()]
    return tag("div", tag("p", "Beside this page:"), tag("ul", *items)) if items else Html("")


def notes(run: Run) -> Html:
    """Files of the run folder that are damaged."""
    return section("Not shown", tag("ul", *(tag("li", line) for line in run.unreadable)) if run.unreadable else "")

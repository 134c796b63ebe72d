"""The tree is the first diagram: imports point down only, and nothing forbidden stands in shared code."""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
# Top to bottom. A module may import from lower levels; within a level only from its own folder.
LEVELS = [
    (
        {"mim.__main__", "mim.api"},
        "__main__: python -m mim NAME, the same as python tools/NAME.py, or mim-NAME once installed; "
        "api: the same from Python, as functions",
    ),
    ({"mim.commands"}, "one function per command: its arguments are its options; order of the work, what is printed"),
    ({"mim.benchmark"}, "timings of a step, of reduced models, accuracy over speed"),
    ({"mim.transfer"}, "evaluations with labels: weights and images in, scores and a section of the report out"),
    (
        {"mim.callbacks", "mim.cli"},
        "callbacks: what happens beside a step; cli: help, short options, three-line errors, without torch",
    ),
    ({"mim.run"}, "a run on disk: folder, settings, checkpoints, weights in and out"),
    ({"mim.methods", "mim.report"}, "methods: one file each, the loss of a paper; report: the page of a run"),
    (
        {"mim.evaluation", "mim.pictures", "mim.targets"},
        "evaluation: scores from tensors; pictures: strips, tokens, overlays; targets: what a patch is to become",
    ),
    (
        {"mim.encoder", "mim.conv_encoder", "mim.memory"},
        "encoder: the only adapter over timm's ViTs; conv_encoder: over its conv nets; memory: further tasks for a ViT "
        "that stands still",
    ),
    (
        {"mim.data", "mim.reduction"},
        "data: sources, readers, order, crops, views; reduction: fewer tokens inside the encoder",
    ),
    (
        {"mim.interop", "mim.masking", "mim.options", "mim.layers", "mim.tokenizers"},
        "interop: files of other programs; masking: which patches are hidden; options: ranges, refusals, families of "
        "options; layers: parts that two methods share; tokenizers: images as integers and back",
    ),
    (
        {"mim", "mim.atomic", "mim.conv_nets", "mim.distributed", "mim.errors", "mim.hub", "mim.lora", "mim.patches"}
        | {"mim.program", "mim.randomness", "mim.schedules", "mim.terminal", "mim.vit"},
        "files that are whole or not there, processes and devices, three-line errors, the model hub, LoRA, how the "
        "program was started, patches of an image, keyed randomness, schedules, what a person at a terminal sees, "
        "timm's ViTs and conv nets",
    ),
]
MODULES = sorted((ROOT / "mim").rglob("*.py"))
METHODS = {
    node.name
    for path in (ROOT / "mim" / "methods").glob("*.py")
    if path.stem != "base"
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.ClassDef)
}
"""Every class of the method files, read as text: the methods, their settings and heads."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def home(module: str) -> str:
    """The entry of LEVELS that a module belongs to."""
    known = set().union(*(names for names, _ in LEVELS))
    return max((name for name in known if module == name or module.startswith(name + ".")), key=len)


def level(name: str) -> int:
    return next(number for number, (names, _) in enumerate(LEVELS) if name in names)


def levels_as_text() -> str:
    """The levels as docs/architecture.md shows them."""
    rows = [
        (", ".join(sorted(name.removeprefix("mim.") for name in names if name != "mim")), text)
        for names, text in LEVELS
    ]
    return "\n".join(f"| {names} | {text} |" for names, text in rows)


def test_the_docs_show_these_levels():
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert levels_as_text() in page, "docs/architecture.md: replace its table of levels by\n" + levels_as_text()


class Found(NamedTuple):
    """What a module names."""

    imports: set[str]
    attributes: set[str]
    names: set[str]
    calls: list[tuple[str, dict[str, str]]]


def dotted(node: ast.expr) -> str:
    """``a.b.c`` as it is written; empty for what is no chain of names."""
    if isinstance(node, ast.Attribute):
        return f"{owner}.{node.attr}" if (owner := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


@cache
def look(path: Path) -> Found:
    """Parsed once for all that is asked about a module."""
    found = Found(set(), set(), set(), [])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.imports.update({f"{node.module}.{alias.name}" for alias in node.names} | {node.module})
        elif isinstance(node, ast.Attribute):
            found.attributes.add(dotted(node))
        elif isinstance(node, ast.Name):
            found.names.add(node.id)
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg in RISKY}
            found.calls.append((dotted(node.func), keywords))
    return found


RISKY = ("shell", "weights_only")
"""Arguments that can let code in."""


def imports(path: Path) -> set[str]:
    return {name for name in look(path).imports if name.split(".")[0] == "mim"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    own = home(name_of(path))
    if own == "mim":  # the door: it names what is in the api, and imports it when it is asked for
        assert {home(imported) for imported in imports(path)} == {"mim.api", "mim.errors"}
        return
    for imported in imports(path):
        other = home(imported)
        if other not in (own, "mim"):
            assert level(other) > level(own), f"{name_of(path)} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_has_a_home_on_a_level(path):
    assert level(home(name_of(path))) >= 0


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_runs_code_from_files(path):
    for function, keywords in look(path).calls:
        assert function not in {
            "eval",
            "exec",
            "pickle.load",
            "pickle.loads",
            "yaml.load",
            "os.system",
            "torch.hub.load",
        }
        assert keywords.get("shell") != "True", f"{path}: shell=True"
        assert keywords.get("weights_only") != "False" or function.endswith("save_checkpoint"), f"{path}: {function}"
        if function == "torch.load":
            assert "weights_only" in keywords, f"{path}: torch.load without weights_only"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_reaches_for_the_network(path):
    """Only timm does, by name, and what reads shards behind URLs: no hub of torch, no client, no socket."""
    names = look(path).imports | look(path).attributes
    assert not [name for name in names if name.startswith("torch.hub")]
    roots = {name.split(".")[0] for name in names}
    roots -= {"fsspec"} if path.name == "remote.py" else set()
    assert not roots & {"socket", "urllib", "http", "ftplib", "requests", "httpx", "aiohttp", "fsspec"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_shared_code_does_not_know_method_names(path):
    if path.is_relative_to(ROOT / "mim" / "methods") or name_of(path) == "mim.benchmark.plain":
        return
    assert not look(path).names & METHODS


def test_there_is_no_drawer_for_odds_and_ends():
    assert not [path for path in MODULES if path.stem in {"utils", "helpers", "common", "misc"}]


def test_no_two_files_of_tests_have_one_name():
    """Without packages among the tests a second one of a name stops the whole suite."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))

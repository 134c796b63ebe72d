"""The tree is the first diagram: imports point down only, and nothing forbidden stands in shared code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module may import from lower levels; within a level only from its own folder.
LEVELS = [
    {"mim", "mim.devices", "mim.errors", "mim.randomness", "mim.patches", "mim.processes", "mim.schedules"}
    | {"mim.sharding"},
    {"mim.config_file", "mim.layers", "mim.masking", "mim.outputs", "mim.ranges", "mim.reduction", "mim.refusals"},
    {"mim.subject", "mim.segment_options"},
    {"mim.encoder"},
    {"mim.targets"},
    {"mim.methods", "mim.evaluation", "mim.data", "mim.interop"},
    {"mim.config", "mim.checkpoint_io", "mim.failures", "mim.pictures", "mim.overlays", "mim.plain", "mim.run"},
    {"mim.checkpoint", "mim.reduction_io", "mim.report", "mim.benchmark", "mim.token_pictures"},
    {"mim.callbacks", "mim.measure", "mim.compare", "mim.benchmark_reduction"},
    {"mim.supervised"},
    {"mim.finetuning", "mim.segmenting", "mim.pareto_page"},
    {"mim.pareto", "mim.pareto_finetuned"},
    {"mim.commands"},
    {"mim.cli"},
    {"mim.__main__"},
]
# `info` lists what the front knows; benchmark times what the front can start.
SIDEWAYS = {("mim.commands", "mim.cli")}
MODULES = sorted((ROOT / "mim").rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def home(module: str) -> str:
    """The entry of LEVELS that a module belongs to."""
    known = set().union(*LEVELS)
    return max((name for name in known if module == name or module.startswith(name + ".")), key=len)


def level(name: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if name in names)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name.split(".")[0] == "mim"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    own = home(name_of(path))
    for imported in imports(path):
        other = home(imported)
        if other == own or other == "mim" or (own, other) in SIDEWAYS:
            continue
        assert level(other) < level(own), f"{name_of(path)} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_has_a_home_on_a_level(path):
    assert level(home(name_of(path))) >= 0


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_runs_code_from_files(path):
    for function, keywords in calls(path):
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
    """Only timm does, by the name of weights: no hub of torch, no client, no socket."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert not [name for name in names if name.startswith("torch.hub")]
    roots = {name.split(".")[0] for name in names}
    assert not roots & {"socket", "urllib", "http", "ftplib", "requests", "httpx", "aiohttp", "fsspec"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_shared_code_does_not_know_method_names(path):
    if path.is_relative_to(ROOT / "mim" / "methods") or path.name == "plain.py":
        return
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not names & {"MAE", "IBOT", "HPM"}


def test_there_is_no_drawer_for_odds_and_ends():
    assert not [path for path in MODULES if path.stem in {"utils", "helpers", "common", "misc"}]

"""Pages that are written from the code, so that they cannot differ from it: options, recipes, mistakes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from mim.cli import COMMANDS, help_page
from mim.options.recipes import CONFIGS, recipe_names

ROOT = Path(__file__).parents[1]
MISTAKES = {"UserError": 2, "DivergedError": 3, "MachineError": 4, "InterruptedRunError": 75}
"""The errors that end a command in three lines, and the statuses that they end with."""


def write_pages(folder: Path) -> None:
    """Writes all of them into a folder."""
    folder.mkdir(exist_ok=True)
    for name, text in {
        "options": options(),
        "recipes": recipes(),
        "trouble": troubles(),
        "functions": functions(),
    }.items():
        page = folder / f"{name}.md"
        if not page.is_file() or page.read_text() != text:  # an unchanged page is not built again
            page.write_text(text)


def options() -> str:
    """All options of all commands, as ``--help_all`` prints them."""
    lines = ["# Options", "", "What `--help_all` prints, for each command. All of them read options alike:"]
    lines += ["`--batch-size 8` is `--batch_size=8`, `--flip` is `--flip true`, and `--k 10,20` is `--k [10,20]`.", ""]
    for command in COMMANDS:
        lines += [f"## {command}", "", "```text", help_page(command, whole=True), "```", ""]
    return "\n".join(lines)


def recipes() -> str:
    """Every recipe: what its first line says, and what it trains for how long."""
    told = {name: (CONFIGS / f"{name}.yaml").read_text() for name in recipe_names()}
    lines = ["# Recipes", "", "`--config NAME` takes one of these, or a file of your own; any option goes over it.", ""]
    lines += ["## Pretraining", "", "| `--config` | what it is | model | epochs | batch |", "|---|---|---|---|---|"]
    trainings = {name: text for name, text in told.items() if "model" in yaml.safe_load(text)}
    for name, text in trainings.items():
        settings = yaml.safe_load(text)
        model = settings["model"]["init_args"]["encoder"].get("model", "")
        lines.append(_row(f"`{name}`", _title(text), model, settings.get("epochs"), settings["data"].get("batch_size")))
    lines += ["", "## Evaluation", "", "| `--config` | what it is |", "|---|---|"]
    lines += [_row(f"`{name}`", _title(text)) for name, text in told.items() if name not in trainings]
    return "\n".join(lines) + "\n"


def _title(recipe: str) -> str:
    return recipe.partition("\n")[0].lstrip("# ")


def troubles() -> str:
    """Every mistake that a command can name, by the module that notices it."""
    lines = ["# Trouble", "", "What a command says when it stops, why, and what to try; `...` stands for what only the"]
    lines += ["moment tells. The status is 2 for a mistake, 3 for numbers that are not finite, 4 for a failure of the"]
    lines += ["machine, 75 for a run that was stopped and saved.", ""]
    for path in sorted((ROOT / "mim").rglob("*.py")):
        tree = ast.parse(path.read_text())
        if rows := list(_rows(tree)):
            title = (ast.get_docstring(tree) or path.stem).partition("\n")[0].rstrip(".").replace("``", "`")
            lines += [f"## {title}", "", "| error | why | try | status |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _rows(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MISTAKES and node.args:
            given = {word.arg: _text(word.value) for word in node.keywords}
            error = _text(node.args[0])
            if error.strip(". "):
                yield _row(error, given.get("why"), given.get("hint"), MISTAKES[node.func.id])


def _text(node: ast.expr) -> str:
    """The text of a string in the source; what is filled in later as three dots."""
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(_text, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case ast.IfExp(body=body, orelse=other):
            return _text(body) or _text(other)
        case ast.Constant(value=None):
            return ""
    return "..."


def _row(*cells: object) -> str:
    """A row of a table, in which nothing but whole code is markup."""
    return "| " + " | ".join("" if cell is None else _plain(" ".join(str(cell).split())) for cell in cells) + " |"


def _plain(text: str) -> str:
    return text if text.startswith("`") else re.sub(r"([|*_<>`\[\]\\])", r"\\\1", text)


def functions() -> str:
    """What ``mim`` offers to Python, from signatures and docstrings."""
    import mim

    lines = ["# Functions", ""]
    for name in mim.__all__:
        kind = "class" if name[0].isupper() else "function"
        lines += ["```{eval-rst}", f".. auto{kind}:: mim.{name}", "   :members:" if kind == "class" else "", "```", ""]
    return "\n".join(lines)

"""Settings under names that they had in earlier versions: saved runs and recipes that people keep are still read."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mim.options.yaml_files import Loader

RENAMED = {"masking.whole": "unmasked_share"}
"""Dotted end of the old name, without ``init_args``, to the last part of the new one."""
STANDARDISE = "standardise"
"""Once a setting of MAE itself, now one of its target."""


def current_arguments(args: Sequence[str]) -> list[str]:
    """Arguments ``--NAME=VALUE`` under the names of today; in the place of old config files their contents."""
    return [current for arg in args for current in _current_argument(arg)]


def current_yaml(text: str) -> str:
    """A config under the names of today; the very same text if it has no other, or is no YAML at all."""
    try:
        root = yaml.compose(text, Loader=Loader)
    except yaml.YAMLError:  # which the parser explains
        return text
    # Nodes, not values: what looks like a number to the parser and like text to YAML stays as it is written.
    return yaml.serialize(root, Dumper=yaml.SafeDumper) if root is not None and _renamed(root) else text


def _current_argument(arg: str) -> Iterator[str]:
    option, _, value = arg.partition("=")
    path = option.removeprefix("--").replace(".init_args.", ".")
    if option == "--config" and Path(value).is_file():
        text = Path(value).read_text(errors="replace")
        yield arg if (current := current_yaml(text)) == text else f"--config={current}"
    elif path == f"model.{STANDARDISE}":
        yield "--model.init_args.target=PixelTarget"
        yield f"--model.init_args.target.init_args.{STANDARDISE}={value}"
    elif name := _current_name(f".{path}"):
        yield f"{option.rpartition('.')[0]}.{name}={value}"
    else:
        yield arg


def _renamed(node: Node, path: str = "") -> bool:
    """Renames the keys below ``node`` in place; whether there was one."""
    if isinstance(node, SequenceNode):
        return any([_renamed(item, path) for item in node.value])
    if not isinstance(node, MappingNode):
        return False
    changed = _with_target(node) if path == ".model" else False
    for key, value in node.value:
        here = path if key.value == "init_args" else f"{path}.{key.value}"
        if name := _current_name(here):
            key.value, changed = name, True
        changed |= _renamed(value, here)
    return changed


def _with_target(model: MappingNode) -> bool:
    """MAE's ``standardise`` becomes that of its target, in place; beside a target it is refused later."""
    if any(key.value == "target" for key, _ in model.value):
        return False
    for place, (key, value) in enumerate(model.value):
        if key.value == STANDARDISE:
            target = yaml.compose(f"{{class_path: PixelTarget, init_args: {{{STANDARDISE}: null}}}}", yaml.SafeLoader)
            assert target is not None
            init_args = target.value[1][1]
            init_args.value = [(init_args.value[0][0], value)]
            model.value[place] = (ScalarNode(key.tag, "target"), target)
            return True
    return False


def _current_name(path: str) -> str | None:
    """The last part of the new name of the setting at ``path``, if that is an old one."""
    return next((name for old, name in RENAMED.items() if path.endswith(f".{old}")), None)

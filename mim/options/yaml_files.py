"""YAML that is looked at before the parser takes it: plain data, without tags of Python."""

from pathlib import Path
from typing import Any

import yaml

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""That of libyaml where there is one: the same data, ten times as fast."""


def settings_in(file: Path) -> dict[str, Any]:
    """What a file sets, by name; nothing if it holds anything else, which the parser tells in its own words."""
    try:
        settings = Loader(file.read_bytes()).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}

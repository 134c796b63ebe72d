"""How this program was started, so that what it tells people to type works for them."""

import shlex
import sys
from pathlib import Path


def called(command: str) -> str:
    """The start of a command line that runs ``command``, in the form in which this process was started itself.

    ``python tools/knn.py`` in a checkout, ``mim-knn`` from an installed script, ``python -m mim knn`` everywhere else.
    """
    script = Path(sys.argv[0])
    if script.name.startswith("mim-"):
        return f"mim-{command.replace('_', '-')}"
    if script.parent.name == "tools" and script.suffix == ".py":
        return f"python {shlex.quote(str(script.with_name(f'{command}.py')))}"
    return f"python -m mim {command}"

"""What the parser of the command line refuses, in the words of people who do not write Python."""

import difflib
import re

from jsonargparse import ArgumentError, ArgumentParser

from mim.errors import UserError, printable

_REASON = re.compile(
    r"Not a valid subclass of \w+|Expected a (?!<class 'NoneType'>|path)[^\n]+?(?=\. Got|\n|$)"
    r"|Not of type [^:\n]+|Importing '[\w.]+' is not allowed|Unable to load config"
)
_GIVEN = [rf"{words}: ([^\n]*)" for words in (r"Not of type [^:\n]+", "Got value", "Given value")]
"""How the parser introduces a value, the innermost first."""


def refusal(error: ArgumentError, parser: ArgumentParser, everything: str) -> UserError:
    """The three lines for an option or a setting that ``parser`` has refused.

    Args:
        error: what it raised.
        parser: knows what would have been right.
        everything: the option that lists all others.
    """
    hint = f"{everything} lists every option"
    text = str(error).strip()
    reasons = re.findall(_REASON, text)
    values = next(filter(None, (re.findall(given, text) for given in _GIVEN)), [])
    if reasons:
        # The keys lead from the outside in; what does not fit is told last.
        key = ".".join(dict.fromkeys(re.findall(r'Parser key "([\w.]+)"', text)))
        given = re.sub(r"^NestedArg\(key='[\w.]*', val='?(.*?)'?\)$", r"\1", values[-1] if values else "that")
        why = " or ".join(dict.fromkeys(map(_plain, reasons)))[:200]
        return UserError(f"--{key} cannot be {printable(given[:80])}", why=why, hint=hint)
    if missing := re.search(r"following arguments are required: ([\w.]+)", text):
        return UserError(f"--{missing[1]} is missing", hint=hint)
    text = re.sub(r"\s+", " ", text)
    refusals = r"[Uu]nrecognized arguments:|does not accept (?:option|nested key)|Option(?= '[\w.]+' is not accepted)"
    unknown = re.search(rf"(?:{refusals}) [\"'-]*([\w.]+)", text)
    known = {action.dest.split(".")[-1]: action.dest for action in parser._actions}
    near = difflib.get_close_matches(unknown[1].split(".")[-1], known, 1) if unknown else []
    hint = f"did you mean --{known[near[0]]}?" if near else hint
    return UserError(f"there is no setting {unknown[1]}" if unknown else printable(text[:400]), hint=hint)


def _plain(reason: str) -> str:
    """A reason of the parser in the words of people who do not write Python."""
    reason = re.sub(r"<class '([\w.]+)'>", r"\1", reason).replace("a typing.Literal", "one of ")
    reason = re.sub(r"Expected a dot import path string: .*", "there is no such class", reason)
    reason = reason.replace("Unable to load config", "it is neither a set of settings nor a file of them")
    reason = re.sub(r"\btuple\b", "list such as [1,2]", reason)
    reason = re.sub(r"^Not of type (?=int)|^Expected a (?=int)", "Expected an ", reason)
    reason = reason.replace("Not of type", "Expected a")
    return reason[0].lower() + reason[1:]

"""The errors that end a command in three lines, without a traceback."""

import re
from typing import ClassVar

MACHINE_ERRORS = (RuntimeError, MemoryError, EOFError, ConnectionResetError, ConnectionRefusedError)
"""What exhausted memory and dead processes end in; :func:`mim.run.failures.as_machine_error` tells them from bugs."""

_MADE_ANEW = re.compile(
    r"\ACaught \w+ in DataLoader worker .*\nmim\.errors\.\w+: error: (.*?)(?:\nwhy:   (.*?))?(?:\ntry:   (.*?))?\s*\Z",
    re.DOTALL,
)
"""What torch makes an error of a loader process anew from: its traceback, at the end of which are the three lines."""


class UserError(Exception):
    """A mistake that the user can mend; the command line prints it in three lines and exits with its status, 2.

    Args:
        error: what is wrong and where, naming the option or file.
        why: the reason, if it is not obvious.
        hint: a command or setting that works.
        alone: it happened to one process among several, which then says so itself; what happens to all is said once.
    """

    status: ClassVar[int] = 2

    def __init__(self, error: str, *, why: str | None = None, hint: str | None = None, alone: bool = False) -> None:
        if found := _MADE_ANEW.search(error):
            self.add_note(error)
            (error, why, hint), alone = found.groups(), True
        super().__init__(error)
        self.error, self.why, self.hint, self.alone = error, why, hint, alone

    def about(self, option: str, *, instead_of: str) -> "UserError":
        """The same mistake, made in another option."""
        error, why, hint = (
            text and text.replace(f"{instead_of} ", f"{option} ") for text in (self.error, self.why, self.hint)
        )
        return type(self)(error or "", why=why, hint=hint, alone=self.alone)

    def __str__(self) -> str:
        """The lines ``error:``, ``why:`` and ``try:``, each only if it says something."""
        lines = [("error:", self.error), ("why:  ", self.why), ("try:  ", self.hint)]
        return "\n".join(f"{head} {text}" for head, text in lines if text)


class DivergedError(UserError):
    """Numbers are not finite: the same command would end the same way again."""

    status: ClassVar[int] = 3


class MachineError(UserError):
    """Memory, a disk or another process failed: the same command may well end better."""

    status: ClassVar[int] = 4


class InterruptedRunError(UserError):
    """A signal stopped the work, which is saved and can be gone on with."""

    status: ClassVar[int] = 75


class StoppedError(Exception):
    """A signal came; the step that was running is saved, and the same command can go on with ``--resume``."""


def printable(path: str) -> str:
    """The path with line breaks, terminal escapes and undecodable bytes spelled out, for messages."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in path)

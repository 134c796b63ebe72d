"""Unreadable files: named once, counted, and judged against a limit."""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mim.data.files import ImageError
from mim.errors import UserError
from mim.program import called, quoted

Bad = tuple[str, str]
"""(file, reason) of something that could not be read."""


class BadFiles:
    """Unreadable files: each named once, written down, and counted against a limit.

    Args:
        limit: share of all files above which :meth:`stop_if_too_many` raises.
        data: where the files are, as the user gave it.
        go_on: option that lets the command go on where it stopped, for those without a log.
        reading: options that say how the data are read.
    """

    def __init__(self, limit: float, data: str, go_on: str = "", reading: str = "") -> None:
        self.limit, self.data, self.go_on, self.reading = limit, data, go_on, reading
        self.total = 0
        self.reasons: dict[str, str] = {}
        self.news: list[Bad] = []  # what the other processes of a run have not been told yet
        self._log: Path | None = None

    def write_to(self, log: Path) -> None:
        """Appends to ``log`` from now on; files that it names already stay known, as after a resume."""
        known = [line.split("\t", 1) for line in log.read_text().splitlines()] if log.exists() else []
        found, self.reasons = self.reasons, {line[0]: line[-1] for line in known}
        self.news = list(self.reasons.items())
        self._log = log
        for name, reason in found.items():
            self._note(name, reason)

    def add(self, *files: Bad) -> None:
        """Notes unreadable files; the first mention of each is printed."""
        for name, reason in files:
            if name not in self.reasons:
                warnings.warn(f"{name} cannot be read ({reason}) - skipped", BadFileWarning, stacklevel=2)
                self._note(name, reason)

    def _note(self, name: str, reason: str) -> None:
        if name in self.reasons:
            return
        self.reasons[name] = reason
        self.news.append((name, reason))
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(f"{name}\t{reason}\n")

    def too_many(self, seen: int | None = None) -> bool:
        """Whether more than ``limit`` of ``seen`` (by default: all) files are unreadable."""
        return len(self.reasons) > self.limit * (seen or self.total)

    def stop_if_too_many(self, seen: int | None = None) -> None:
        """Raises a :class:`UserError` if there are :meth:`too_many`."""
        seen = seen or self.total
        if not self.too_many(seen):
            return
        from mim.data.objects import is_object  # with torch, which whoever only names files does without

        share = len(self.reasons) / seen
        tolerant = f"{self.go_on} --max_bad {min(1.0, max(0.05, 2 * share)):.2g}".strip()
        looked = f"{called('check_data')} --data {quoted(self.data)}{self.reading}"
        hint = f"{looked} --fix good.csv   then   --data good.csv"
        if is_object(self.data):
            hint = "mend the data set"
        elif self._log is not None:
            hint = f"{called('pretrain')} --resume {quoted(self._log.parent)} {tolerant}"
            tolerant = f"mend the files, empty {self._log} and --resume {self._log.parent}"
        raise UserError(
            f"{len(self.reasons)} of {seen:,} images are unreadable ({share:.1%}, limit {self.limit:.1%})",
            why="first: " + ", ".join(f"{name} ({reason})" for name, reason in list(self.reasons.items())[:3]),
            hint=f"{hint}   (or {tolerant})",
        )


_OTHER_WEIGHTS = "weights that were trained on such images"


class BadFileWarning(UserWarning):
    """A file was skipped."""


def refuse_channels(
    data: str,
    errors: Sequence[ImageError],
    channels: int,
    count: int,
    option: str | None = "--in_chans",
    bands: Sequence[int] = (),
) -> None:
    """Raises a :class:`UserError` if that is what is wrong with all of ``count`` images, not with some."""
    found = [error.channels for error in errors if error.channels is not None]
    if len(found) < count or not found:
        return
    number = Counter(found).most_common(1)[0][0]
    kinds = (
        f"{number} channel{'s' * (number != 1)}"
        if min(found) == max(found)
        else f"{min(found)} to {max(found)} channels"
    )
    some = ",".join(str(band) for band in range(min(channels, number), 0, -1))
    if bands:
        raise UserError(
            f"--data {data}: the images have {kinds}, --bands asks for number {max(bands)}",
            hint=f"--bands {some}" if option else _OTHER_WEIGHTS,
        )
    raise UserError(
        f"--data {data}: the images have {kinds}, the model takes {channels}",
        hint=f"{option} {number}" + (f"   or   --bands {some}   to choose {channels}" if number > channels else "")
        if option
        else _OTHER_WEIGHTS,
    )

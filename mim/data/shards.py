"""Tar files as an index of byte ranges: headers are read once, nothing is extracted or unpickled.

A shard may be hostile. Only ordinary members count, their names are never used as paths, and sizes are checked against
the file and against the limit for images before anything is read.
"""

import io
import json
import os
import re
import shlex
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

from braceexpand import braceexpand

from mim.data.files import MAX_FILE_BYTES, ImageError
from mim.errors import UserError

MAX_HEADER_BYTES = 1 << 20
"""Extended headers (long names) above 1 MiB are refused."""
MAX_LABEL_BYTES = 1 << 16
"""Label members above 64 KiB are no labels."""
LABEL_FIELDS = ("label", "class", "cls", "target", "category")
"""What a ``.json`` member may call its sample's class."""
MAX_SHARDS = 10**6
"""Tar files that one pattern may name."""


class Member(NamedTuple):
    """A file in a tar file.

    Attributes:
        shard: path of the tar file.
        name: the member's path inside it; for messages and labels only.
        offset: where its content starts in the tar file, in bytes.
        size: of its content, in bytes.
        ordinary: False for links, devices and pipes.
        content: what it holds, if that was read with its header.
    """

    shard: str
    name: str
    offset: int
    size: int
    ordinary: bool
    content: bytes | None = None

    @property
    def path(self) -> str:
        """The member as messages call it."""
        return f"{self.shard}/{self.name}"

    @property
    def stem(self) -> str:
        """The path without the last suffix of the file's name: files that share it belong together."""
        folder, slash, name = self.path.rpartition("/")
        return folder + slash + (name.rpartition(".")[0] or name)

    @property
    def key(self) -> str:
        """What the files of one WebDataset sample share: the path up to the first dot of the file's name."""
        folder, slash, name = self.path.rpartition("/")
        return folder + slash + name.partition(".")[0]


Place = tuple[int, int, int]
"""Number of a tar file, offset and size in it, in bytes."""


class Shards(Protocol):
    """Tar files, wherever they are.

    Attributes:
        names: their paths or URLs, in the order of their images.
    """

    names: list[str]

    def members(self, damaged: list[ImageError]) -> Iterable[Member]:
        """All whole members in order; what is wrong with the others is appended to ``damaged``."""
        ...

    def content(self, member: Member) -> bytes:
        """A small member's content."""
        ...

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset`` of the tar file of that number, fewer at its end; raises ``OSError``."""
        ...

    def fetch(self, places: Sequence[Place]) -> None:
        """Makes the next reads of these places quick."""
        ...


class LocalShards:
    """``Shards`` on this disk; raises ``UserError`` if one is missing."""

    def __init__(self, pattern: str) -> None:
        self.names = expand_shards(pattern)
        missing = [shard for shard in self.names if not os.path.isfile(shard)]
        if missing:
            raise missing_shards(pattern, missing, len(self.names))

    def members(self, damaged: list[ImageError]) -> Iterator[Member]:
        """See :class:`Shards`."""
        for shard in self.names:
            try:
                with open(shard, "rb", buffering=0) as file:
                    yield from tar_members(shard, file, os.path.getsize(shard), damaged)
            except OSError as error:
                damaged.append(ImageError(shard, str(error)))

    def content(self, member: Member) -> bytes:
        """See :class:`Shards`."""
        return _read_part(member.shard, member.offset, member.size)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """See :class:`Shards`."""
        return _read_part(self.names[shard], offset, size)

    def fetch(self, places: Sequence[Place]) -> None:
        """See :class:`Shards`: a disk is quick."""


def expand_shards(pattern: str) -> list[str]:
    """The names that a pattern such as ``train-{0000..0099}.tar`` stands for; raises ``UserError`` if it is none."""
    spans = [(int(start), int(end)) for start, end in re.findall(r"{(-?\d+)\.\.(-?\d+)", pattern)]
    count = prod(abs(end - start) + 1 for start, end in spans)
    if count > MAX_SHARDS:  # before it is expanded: that would take all memory
        hint = "--data 'train-{0000..0099}.tar'"
        raise UserError(f"--data {pattern} names {count:,} tar files, more than {MAX_SHARDS:,}", hint=hint)
    try:
        return list(islice(braceexpand(pattern), MAX_SHARDS))
    except ValueError as error:
        raise UserError(f"--data {pattern}: {error}", hint="--data 'train-{0000..0099}.tar'") from None


def missing_shards(pattern: str, missing: Sequence[str], count: int) -> UserError:
    """What is told of shards that are not there, and which of them are."""
    return UserError(
        f"--data {pattern}: {len(missing)} of {count} tar files are missing, first {missing[0]}",
        hint=_present(pattern, set(missing)) or _look(missing[0]),
    )


def _present(pattern: str, missing: set[str]) -> str | None:
    """The option that names the first shards of a pattern that are there; None if there are none."""
    names = expand_shards(pattern)
    start = next((place for place, name in enumerate(names) if name not in missing), None)
    if start is None:
        return None
    end = next((place for place in range(start, len(names)) if names[place] in missing), len(names)) - 1
    spans = re.findall(r"{(-?\d+)\.\.(-?\d+)}", pattern)
    if end == start or len(spans) != 1 or pattern.count("{") != 1 or int(spans[0][0]) > int(spans[0][1]):
        return f"--data {shlex.quote(names[start])}"
    before, after = pattern.index("{"), len(pattern) - pattern.index("}") - 1
    first, last = (names[place][before : len(names[place]) - after] for place in (start, end))
    return f"--data '{pattern[:before]}{{{first}..{last}}}{pattern[len(pattern) - after :]}'"


def _look(name: str) -> str:
    """A command that shows what is there instead."""
    if "://" in name:
        return f"curl -I {shlex.quote(name)}" if name.startswith("http") else "a URL of shards that are there"
    folder = next(parent for parent in Path(name).absolute().parents if parent.is_dir())
    return f"ls {shlex.quote(str(folder))}"


def tar_members(shard: str, file: io.RawIOBase, length: int, damaged: list[ImageError]) -> Iterator[Member]:
    """The whole members of a tar file but its folders.

    Args:
        shard: what it is called.
        file: the same, open; only headers are read.
        length: of the file in bytes.
        damaged: what is wrong with other members is appended to it.
    """
    try:
        with _Headers(file) as headers, tarfile.open(fileobj=headers, mode="r:") as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header, and has no option
                if problem := _problem(info, length):
                    damaged.append(ImageError(f"{shard}/{info.name}", problem))
                elif not info.isdir():
                    yield Member(shard, info.name, info.offset_data, info.size, info.isreg())
                if info.size < 0:  # the next header would be this one, for ever
                    return
            # tarfile takes a damaged header for the end, which is a block of zeros or the end of the file.
            file.seek(tar.offset)
            if any(file.read(tarfile.BLOCKSIZE) or b""):
                raise tarfile.ReadError(f"damaged header at byte {tar.offset}, the rest is not read")
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
        damaged.append(ImageError(shard, str(error) or type(error).__name__))


def _read_part(shard: str, offset: int, size: int) -> bytes:
    with open(shard, "rb") as file:
        file.seek(offset)
        return file.read(size)


def read_label(member: Member, content: Callable[[Member], bytes]) -> str | None:
    """The class in a ``.cls`` member (its text) or a ``.json`` member (its ``label``, ``class`` or ``target``).

    Args:
        member: of a shard.
        content: reads it.

    Returns:
        Empty if there is none, None if there are several.
    """
    if member.size > MAX_LABEL_BYTES:
        return ""
    try:
        text = content(member).decode()
        if member.name.lower().endswith(".cls"):
            return text.strip()
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    fields = fields if isinstance(fields, dict) else {}
    label = next((fields[name] for name in LABEL_FIELDS if fields.get(name) is not None), "")
    if isinstance(label, list) and len(label) == 1:
        label = label[0]
    return None if isinstance(label, list | dict) else str(label).strip()


class _Headers(io.RawIOBase):
    """A tar file of which tarfile reads headers only: one that claims to be huge is refused, not allocated."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size) or b""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _problem(info: tarfile.TarInfo, length: int) -> str | None:
    if info.size < 0:
        return "negative size"
    if info.issparse():
        return "a sparse member"
    if info.isreg() and info.size > MAX_FILE_BYTES:
        return f"{info.size >> 20} MiB, more than the limit of {MAX_FILE_BYTES >> 20} MiB"
    if info.isreg() and info.offset_data + info.size > length:
        return "the tar file is truncated"
    return None

"""Tar files as an index of byte ranges: headers are read once, nothing is extracted or unpickled.

A shard may be hostile. Only ordinary members count, their names are never used as paths, and sizes are checked against
the file and against the limit for images before anything is read.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from itertools import islice
from math import prod
from typing import NamedTuple

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
    """

    shard: str
    name: str
    offset: int
    size: int
    ordinary: bool

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


def expand_shards(pattern: str) -> list[str]:
    """The tar files that a pattern such as ``train-{0000..0099}.tar`` names; raises ``UserError`` if one is missing."""
    spans = [(int(start), int(end)) for start, end in re.findall(r"{(-?\d+)\.\.(-?\d+)", pattern)]
    count = prod(abs(end - start) + 1 for start, end in spans)
    if count > MAX_SHARDS:  # before it is expanded: that would take all memory
        hint = "--data 'train-{0000..0099}.tar'"
        raise UserError(f"--data {pattern} names {count:,} tar files, more than {MAX_SHARDS:,}", hint=hint)
    try:
        shards = list(islice(braceexpand(pattern), MAX_SHARDS))
    except ValueError as error:
        raise UserError(f"--data {pattern}: {error}", hint="--data 'train-{0000..0099}.tar'") from None
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing:
        raise UserError(f"--data {pattern}: {len(missing)} of {len(shards)} tar files are missing, first {missing[0]}")
    return shards


def tar_members(shard: str, damaged: list[ImageError]) -> Iterator[Member]:
    """The whole members of a tar file but its folders; what is wrong with the others is appended to ``damaged``."""
    try:
        length = os.path.getsize(shard)
        with _Headers(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header, and has no option
                if problem := _problem(info, length):
                    damaged.append(ImageError(f"{shard}/{info.name}", problem))
                elif not info.isdir():
                    yield Member(shard, info.name, info.offset_data, info.size, info.isreg())
                if info.size < 0:  # the next header would be this one, for ever
                    return
            # tarfile takes a damaged header for the end, which is a block of zeros or the end of the file.
            if any(read_part(shard, tar.offset, tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"damaged header at byte {tar.offset}, the rest is not read")
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
        damaged.append(ImageError(shard, str(error) or type(error).__name__))


def read_part(shard: str, offset: int, size: int) -> bytes:
    """``size`` bytes at ``offset``, fewer at the file's end."""
    with open(shard, "rb") as file:
        file.seek(offset)
        return file.read(size)


def read_label(member: Member) -> str | None:
    """The class in a ``.cls`` member (its text) or a ``.json`` member (its ``label``, ``class`` or ``target``).

    Returns:
        Empty if there is none, None if there are several.
    """
    if member.size > MAX_LABEL_BYTES:
        return ""
    try:
        text = read_part(member.shard, member.offset, member.size).decode()
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


class _Headers(io.FileIO):
    """A tar file of which tarfile reads headers only: one that claims to be huge is refused, not allocated."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""


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

"""Tar shards behind URLs: indexed once, then read by ranges, again and again where a network fails.

``s3://``, ``https://``, ``hf://`` and whatever else fsspec knows. Which images there are, and in which order, depends
on the shards alone, as on a disk. A read that fails is tried again; one that cannot succeed ends the command in three
lines and never makes an image unreadable.
"""

import fcntl
import gzip
import hashlib
import io
import json
import os
import random
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mim.data.files import ImageError, NothingReadableError
from mim.data.shards import MAX_LABEL_BYTES, Member, Place, expand_shards, missing_shards, tar_members
from mim.errors import UserError, printable
from mim.terminal import progress

PATIENCE = 90.0
"""Seconds after which a read that keeps failing ends the command; loader processes may be silent for longer."""
OPENING = 15.0
"""The same for a server that is asked for the first time."""
TIMEOUT = 10.0
"""Seconds that one try may take, besides those for its bytes."""
PAUSE = 0.25
"""Seconds before the second try; twice as many before each further one."""
SLOWEST = 4 << 20
"""Bytes per second that are waited for."""
BLOCK = 1 << 21
"""Bytes that are read at once for the index: waiting for a header of its own costs as much as 2 MiB."""
CONNECTIONS = 16
"""Requests of one process at a time."""
_INDEX, _IN_RUN = "index.json.gz", "shards.json.gz"
_HINTS = {
    "s3": "credentials as the AWS command line finds them, or FSSPEC_S3_ANON=true for a public bucket",
    "hf": "HF_TOKEN=TOKEN, if it is not public",
}
_T = TypeVar("_T")


class Fact(NamedTuple):
    """What a server says about a shard.

    Args:
        url: of the shard.
        size: in bytes.
        tag: changes with its content, as far as the server tells.
    """

    url: str
    size: int
    tag: str


class RemoteShards:
    """:class:`mim.data.shards.Shards` behind URLs.

    The index, and the first part of all bytes up to a limit, are kept in a folder of the user's
    (``MIM_CACHE``, ``MIM_CACHE_GB``; ``docs/data.md``).

    Raises:
        UserError: if one is not there, or may not be read.
    """

    def __init__(self, pattern: str) -> None:
        self.names = check_shards(pattern)
        self.facts = _facts(pattern, self.names)
        self.home = _home(self.facts)
        self.starts = list(accumulate((fact.size for fact in self.facts), initial=0))
        self.limit = cache_limit()
        self._ahead: dict[Place, bytes] = {}

    def members(self, damaged: list[ImageError]) -> list[Member]:
        """See :class:`mim.data.shards.Shards`; those with a label come with their content."""
        with _alone(self.home):  # several processes of a run come here at once
            index = _kept(self.home / _INDEX) or self._build()
        damaged += [ImageError(*error) for error in index["damaged"]]
        return [
            Member(self.names[number], name, offset, size, ordinary, text and text.encode("latin-1"))
            for number, name, offset, size, ordinary, text in index["members"]
        ]

    def content(self, member: Member) -> bytes:
        """See :class:`mim.data.shards.Shards`."""
        return member.content or b""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """See :class:`mim.data.shards.Shards`; never fewer bytes than there are, and no ``OSError``."""
        if (ahead := self._ahead.pop((shard, offset, size), None)) is not None:
            return ahead
        file = self.home / str(shard) / f"{offset}-{size}"
        with suppress(OSError):
            if len(content := file.read_bytes()) == size:
                return content
        content = _range(self.facts[shard], offset, size)
        if self.starts[shard] + offset + size <= self.limit:
            with suppress(OSError):  # a full disk: then without
                _write(file, content)
        return content

    def fetch(self, places: Sequence[Place]) -> None:
        """See :class:`mim.data.shards.Shards`; a network is waited for once, not once for each."""
        self._ahead = {}
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            parts = list(threads.map(lambda place: self.read(*place), places))
        self._ahead = dict(zip(places, parts, strict=True))

    def _build(self) -> dict[str, Any]:
        """The index, from the headers of all shards."""
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            parts = threads.map(self._headers, range(len(self.facts)))
            found = list(progress(parts, len(self.facts), "indexing", "shard"))
        index = {
            "facts": self.facts,
            "members": [member for members, _ in found for member in members],
            "damaged": [error for _, errors in found for error in errors],
        }
        with suppress(OSError):
            _write(self.home / _INDEX, gzip.compress(json.dumps(index).encode(), 1))
        return index

    def _headers(self, number: int) -> tuple[list[list[Any]], list[tuple[str, str]]]:
        """Members of one shard as ``[shard, name, offset, size, ordinary, content]``, and what is wrong with others."""
        fact, damaged = self.facts[number], list[ImageError]()
        file = _RangeFile(fact)
        members: list[list[Any]] = []
        for member in tar_members(fact.url, file, fact.size, damaged):
            row = [number, member.name, member.offset, member.size, member.ordinary, None]
            if member.name.lower().endswith((".cls", ".json")) and member.size <= MAX_LABEL_BYTES:
                row[5] = file.part(member.offset, member.size).decode("latin-1")  # any bytes
            members.append(row)
        return members, [(error.path, error.reason) for error in damaged]


class _RangeFile(io.RawIOBase):
    """A remote file from which blocks are read, the last of them kept."""

    def __init__(self, fact: Fact) -> None:
        self.fact, self._at, self._start, self._block = fact, 0, 0, b""

    def read(self, size: int | None = -1, /) -> bytes:
        end = self.fact.size if size is None or size < 0 else min(self._at + size, self.fact.size)
        if end <= self._at:
            return b""
        if not self._start <= self._at < end <= self._start + len(self._block):
            self._start = self._at
            self._block = _range(self.fact, self._at, min(max(BLOCK, end - self._at), self.fact.size - self._at))
        part = self._block[self._at - self._start : end - self._start]
        self._at += len(part)
        return part

    def part(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``; the file stays where it was."""
        at, self._at = self._at, offset
        content = self.read(size)
        self._at = at
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.fact.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at


def is_url(data: str) -> bool:
    """Whether this is a URL, and no path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", data) is not None


def check_shards(pattern: str) -> list[str]:
    """The URLs that a pattern stands for, as far as they can be judged without a network.

    Raises:
        UserError: if they are no tar files, or a package lacks.
    """
    protocol, _, rest = pattern.partition("://")
    if not rest.partition("?")[0].lower().endswith(".tar"):
        hint = f"--data '{protocol}://.../NAME-{{0000..0099}}.tar'"
        raise UserError(f"--data {pattern}: of URLs, only those of .tar files are read", hint=hint)
    try:
        import fsspec

        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise UserError(
            f"--data {pattern}: a package lacks", why=str(error), hint="pip install mim-suite[remote]"
        ) from None
    except ValueError as error:
        raise UserError(f"--data {pattern}: {error}", hint="https://, s3:// or hf://") from None
    return expand_shards(pattern)


def check_first_shard(pattern: str) -> None:
    """Asks the server for the first shard of a pattern, before anything heavy is imported."""
    _facts(pattern, check_shards(pattern)[:1])


def cache_limit() -> int:
    """Bytes of one set of shards that may be kept on this disk."""
    try:
        return round(float(os.environ.get("MIM_CACHE_GB", "10")) * 1e9)
    except ValueError:
        raise UserError(f"MIM_CACHE_GB={os.environ['MIM_CACHE_GB']} is no number", hint="MIM_CACHE_GB=10") from None


def keep_index(data: str, folder: Path) -> None:
    """Puts a copy of the index of remote shards beside a run."""
    if is_url(data):
        shutil.copyfile(_home(_facts(data, check_shards(data))) / _INDEX, folder / _IN_RUN)


def restore_index(data: str, folder: Path) -> None:
    """Uses the index that lies beside a run.

    Raises:
        UserError: if the shards have changed since it was made.
    """
    index = _kept(folder / _IN_RUN) if is_url(data) else None
    if index is None:
        return
    facts = _facts(data, check_shards(data))
    before = {url: [url, *rest] for url, *rest in index["facts"]}
    changed = [fact.url for fact in facts if before.get(fact.url, list(fact)) != list(fact)]
    if changed:
        hint = "the shards as they were, or a new run without --resume"
        raise UserError(f"{printable(changed[0])} has changed since the run began", hint=hint)
    if index["facts"] == [list(fact) for fact in facts] and not (file := _home(facts) / _INDEX).exists():
        with suppress(OSError):
            _write(file, (folder / _IN_RUN).read_bytes())


# Places on this disk --------------------------------------------------------------------------------------------------


def _home(facts: Sequence[Fact]) -> Path:
    """Where index and bytes of these shards are kept: another folder if anything about them changes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mim"
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]
    return Path(os.environ.get("MIM_CACHE") or cache) / name


def _kept(file: Path) -> dict[str, Any] | None:
    """An index, if it is there and whole."""
    try:
        index: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
    except (OSError, EOFError, ValueError):
        return None
    return index


def _write(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all, whoever else writes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.{random.randrange(1 << 30)}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process of this machine in at a time, where the folder can be written."""
    with ExitStack() as held:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context((folder / "lock").open("w")), fcntl.LOCK_EX)
        yield


# Requests -------------------------------------------------------------------------------------------------------------


class _RefusedError(Exception):
    """A server said no, and would say it again."""


def _facts(pattern: str, urls: Sequence[str]) -> list[Fact]:
    """What the server says about all shards; raises ``UserError`` if it does not have them, or not for us."""
    try:
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            found = list(threads.map(_fact, urls))
    except _RefusedError as error:
        hint = _HINTS.get(pattern.partition("://")[0], f"curl -I {shlex.quote(urls[0])}")
        raise UserError(f"--data {pattern} cannot be read", why=str(error), hint=hint) from None
    missing = [url for url, fact in zip(urls, found, strict=True) if fact is None]
    if missing:
        raise missing_shards(pattern, missing, len(urls))
    return [fact for fact in found if fact is not None]


def _fact(url: str) -> Fact | None:
    """Size and tag of a shard; None if there is none."""
    try:
        info = _again(lambda seconds: _call(url, "info", seconds), url, patience=OPENING)
    except FileNotFoundError:
        return None
    if info.get("type") != "file" or not isinstance(info.get("size"), int):
        raise _RefusedError(f"{url}: the server does not tell its size")
    tags = ("ETag", "etag", "LastModified", "Last-Modified", "blob_id", "last_commit", "mtime")
    return Fact(url, info["size"], str(next((info[tag] for tag in tags if info.get(tag)), "")))


def _range(fact: Fact, offset: int, size: int) -> bytes:
    """``size`` bytes at ``offset``; raises ``NothingReadableError`` if they do not come."""

    def read(seconds: float) -> bytes:
        content: bytes = _call(fact.url, "cat_file", seconds, start=offset, end=offset + size)
        if len(content) > size:
            raise _RefusedError("the server answers a request for a range with more than that")
        if len(content) < size:
            raise EOFError(f"{len(content)} of {size} bytes came")
        return content

    if not size:
        return b""
    try:
        return _again(read, fact.url, patience=PATIENCE, size=size)
    except (FileNotFoundError, _RefusedError) as error:
        reason = "is not there any more" if isinstance(error, FileNotFoundError) else str(error)
        raise NothingReadableError(f"{printable(fact.url)}: {reason}") from None


def _again(request: Callable[[float], _T], url: str, patience: float, size: int = 0) -> _T:
    """What a request gives, which is repeated until it gives something or patience ends.

    Raises:
        FileNotFoundError: if there is no such file.
        _RefusedError: if nothing else is to be expected, or time is up.
    """
    start, pause = time.monotonic(), PAUSE
    for tries in range(1, 1000):
        left = patience - (time.monotonic() - start)
        try:
            return request(max(1.0, min(TIMEOUT + size / SLOWEST, left)))
        except _RefusedError:
            raise
        except Exception as error:
            status, text = _status(error), _text(error)
            if status == 404 or (status is None and _root(error) == "FileNotFoundError"):
                raise FileNotFoundError(url) from None
            if _final(error, status):
                raise _RefusedError(f"{printable(url)}: {text}") from None
            left = patience - (time.monotonic() - start)
            if left <= pause:
                raise _RefusedError(f"{printable(url)}: {text} ({tries} tries in {patience - left:.0f} s)") from None
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, 8.0)
    raise AssertionError("unreachable")


def _call(url: str, method: str, seconds: float, **arguments: int) -> Any:  # noqa: ANN401 - fsspec's
    """Calls a method of a URL's file system; one that can be waited for is given up after some seconds."""
    from fsspec.asyn import AsyncFileSystem, sync
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)  # cached by fsspec, one for each process
    if isinstance(files, AsyncFileSystem):
        return sync(files.loop, getattr(files, f"_{method}"), path, timeout=seconds, **arguments)
    # A buffered file would read 5 MiB ahead, and cut an answer that is no range to the length that was asked for.
    unbuffered = {"cache_type": "none"} if method == "cat_file" else {}
    return getattr(files, method)(path, **arguments, **unbuffered)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _root(error: BaseException) -> str:
    return type(list(_chain(error))[-1]).__name__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, if it has one."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for status in (getattr(cause, "status", None), getattr(response, "status_code", response)):
            if isinstance(status, int):
                return status
    return None


def _final(error: BaseException, status: int | None) -> bool:
    """Whether trying again is in vain."""
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    kinds = {type(cause).__name__ for cause in _chain(error)}
    return bool(kinds & {"NoCredentialsError", "PartialCredentialsError", "PermissionError", "ImportError", "gaierror"})


def _text(error: BaseException) -> str:
    """An error in one line: the first that says more than the URL."""
    texts = [str(cause).strip().splitlines()[0] for cause in _chain(error) if str(cause).strip()]
    texts = [text for text in texts if not is_url(text)] or texts
    kinds = [type(cause).__name__ for cause in _chain(error)]
    if any("Timeout" in kind for kind in kinds):
        return "no answer in time"
    return printable(texts[0] if texts else kinds[-1])[:200]

"""Where images come from: what ``--data`` names, opened as a sequence of images that any worker can read.

A folder (flat or nested), a list of files, or tar shards. Only names are read until an image is asked for. The index of
a million images is a few flat arrays, so it is sent to loader workers quickly and forked workers share it.
"""

import csv
import difflib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from mim.data.images import SUFFIXES, ImageError, read_image
from mim.data.loading import reading
from mim.data.pixels import EIGHT_BIT, Pixels
from mim.data.shards import Member, expand_shards, read_label, read_part, tar_members
from mim.errors import UserError, printable

HELD_OUT = ("val", "valid", "validation", "test")
"""Folders beside ``train/`` that hold the held-out images, the first found wins."""


class Source(Protocol):
    """Labelled or unlabelled images by index.

    Attributes:
        name: short, for the run folder.
        labels: class index of each image, or None if it has none.
        classes: class names, sorted; empty without labels.
    """

    name: str
    labels: list[int] | None
    classes: list[str]

    def __len__(self) -> int:
        """Number of images."""
        ...

    def describe(self, index: int) -> str:
        """The image's path as messages show it."""
        ...

    def read(self, index: int) -> Tensor:
        """``(C, H, W)`` of the data set's type; raises ``ImageError``."""
        ...


class FileSource(ABC):
    """A ``Source`` of image files, readable or not.

    Attributes:
        pixels: what the files hold; 8 bit until somebody says otherwise.
        ignored: files that were passed over, counted by type.
        damaged: files that the index already knows to be unreadable; they are not counted in ``len``.
    """

    def __init__(self, name: str, paths: Iterable[str], class_names: Sequence[str] | None, channels: int) -> None:
        self.name, self.channels = name, channels
        self.pixels: Pixels = EIGHT_BIT
        self._paths = _Strings(paths)
        self.classes = sorted(set(class_names or ()), key=_numbers_by_value)
        index = {label: position for position, label in enumerate(self.classes)}
        self.labels = None if class_names is None else [index[label] for label in class_names]
        self.ignored: Counter[str] = Counter()
        self.damaged: list[ImageError] = []

    def __len__(self) -> int:
        """Number of images."""
        return len(self._paths)

    def describe(self, index: int) -> str:
        """The image's path as messages show it."""
        return printable(self._paths[index])

    def read(self, index: int) -> Tensor:
        """``(C, H, W)`` of the type that ``pixels`` names; raises ``ImageError``."""
        name = self.describe(index)
        with reading(name):
            return read_image(self.encoded(index), self.channels, name, self.pixels)

    @abstractmethod
    def encoded(self, index: int) -> Path | bytes:
        """The file, or its content; raises ``ImageError`` if there is none."""


class FolderSource(FileSource):
    """Every image below a folder, sorted by path.

    Labels are the folders in which all images lie: below the deepest folder that holds every image, if there are two
    or more and no image lies beside them. Linked folders are followed once, unless they lead back.

    Args:
        root: the folder.
        channels: of the images.
        name: by default the folder's.
    """

    def __init__(self, root: Path, channels: int = 3, name: str | None = None) -> None:
        paths, ignored, folders = _scan(root)
        if not paths:
            raise _no_images(root, ignored, folders)
        super().__init__(name or root.resolve().name, (f"{root}/{path}" for path in paths), _folders(paths), channels)
        self.ignored = ignored

    def encoded(self, index: int) -> Path:
        """The file."""
        return Path(self._paths[index])


class ListSource(FileSource):
    """The images that a file lists, in its order.

    Args:
        file: ``.txt`` with a path in each line, or ``.csv`` with the columns path and, optionally, label; a first row
            ``path,label`` is a heading. Relative paths start at the list's folder.
        channels: of the images.
    """

    def __init__(self, file: Path, channels: int = 3) -> None:
        rows = _read_list(file)
        if not rows:
            raise UserError(f"--data {file}: 0 images", why="the list is empty")
        paths = [os.path.join(file.parent, path) for path, _ in rows]
        if not any(map(os.path.lexists, paths[:20])):
            why = f"relative paths start at the list's folder, {file.parent.resolve()}"
            raise UserError(f"--data {file}: none of the first {len(paths[:20])} files exists ({paths[0]})", why=why)
        labelled = any(label for _, label in rows)
        if labelled and not all(label for _, label in rows):
            path = printable(next(path for path, label in rows if not label))
            raise UserError(f"--data {file}: {path} has no label, others have", hint="label all or none")
        super().__init__(file.stem, paths, [label for _, label in rows] if labelled else None, channels)

    def encoded(self, index: int) -> Path:
        """The file."""
        return Path(self._paths[index])


class TarSource(FileSource):
    """The images in uncompressed tar files, in their order; nothing is ever extracted.

    Only ordinary members with an image's suffix count. Labels come from ``key.cls`` or the ``label`` in ``key.json``
    beside ``key.jpg`` (WebDataset), otherwise from the folders as in ``FolderSource``.

    Args:
        pattern: a tar file, or many with braces: ``train-{0000..0099}.tar``.
        channels: of the images.
    """

    def __init__(self, pattern: str, channels: int = 3) -> None:
        shards = expand_shards(pattern)
        ignored: Counter[str] = Counter()
        damaged: list[ImageError] = []
        images: list[Member] = []
        labels: dict[str, str] = {}
        for member in (member for shard in shards for member in tar_members(shard, damaged)):
            suffix = _suffix(member.name) if member.ordinary else ""
            if suffix in SUFFIXES:
                images.append(member)
            elif suffix in ("cls", "json"):
                labels[member.key] = read_label(member) or labels.get(member.key, "")
            else:
                ignored[_type(member.name) if member.ordinary else "link or device"] += 1
        if not images:
            raise _no_images(pattern, ignored, len(shards), "tar file", damaged)
        labelled = [image for image in images if labels.get(image.key)]
        if labelled:
            damaged += [ImageError(i.path, "has no label, others have") for i in images if not labels.get(i.key)]
            images = labelled
        class_names = [labels[image.key] for image in images] if labelled else _folders([i.name for i in images])
        name = Path(shards[0]).stem
        name = name if len(shards) == 1 else name.rstrip("-_0123456789")
        super().__init__(name, (image.path for image in images), class_names, channels)
        self.ignored, self.damaged, self._shards = ignored, damaged, shards
        number = {shard: number for number, shard in enumerate(shards)}
        self._places = np.array([(number[i.shard], i.offset, i.size) for i in images], dtype=np.int64)  # (images, 3)

    def encoded(self, index: int) -> bytes:
        """The member's content."""
        shard, offset, size = self._places[index].tolist()
        try:
            return read_part(self._shards[shard], offset, size)
        except OSError as error:
            raise ImageError(self.describe(index), error.strerror or str(error)) from None


def open_source(
    data: str,
    channels: int = 3,
    same_classes: bool = True,
    otherwise: str | None = "leave --data out for the built-in images",
) -> tuple[FileSource, FileSource | None]:
    """What ``--data`` names: training images, and held-out ones if the folder sets some apart.

    Args:
        data: a folder, a ``.txt`` or ``.csv`` list, a ``.tar`` file, or tar shards as ``train-{0000..0099}.tar``.
            A folder with ``train/`` and ``val/`` (``valid``, ``validation``, ``test``) gives both parts. Of a folder
            that holds ``images/`` beside ``masks/``, only the images count.
        channels: of the images.
        same_classes: refuse parts whose classes differ.
        otherwise: what to try if there is no such place.

    Raises:
        UserError: if there is nothing to read, or the parts have different classes.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        name = path.resolve().name
        held_out = next((path / part for part in HELD_OUT if (path / part).is_dir()), None)
        if not (path / "train").is_dir() or held_out is None:
            return FolderSource(_without_masks(path), channels, name), None
        train, held = (FolderSource(_without_masks(part), channels, name) for part in (path / "train", held_out))
        if same_classes:
            _check_classes(data, held_out.name, train.classes, held.classes)
        return train, held
    if path.suffix.lower() in (".txt", ".csv") and path.is_file():
        return ListSource(path, channels), None
    if path.suffix.lower() == ".tar" and (path.is_file() or "{" in data):
        return TarSource(str(path), channels), None
    raise _not_a_source(data, path, otherwise)


# Folders -------------------------------------------------------------------------------------------------------------


def _without_masks(folder: Path) -> Path:
    """The folder's ``images/`` if ``masks/`` lies beside it, so that masks are not taken for a class of images."""
    return folder / "images" if (folder / "images").is_dir() and (folder / "masks").is_dir() else folder


def _scan(root: Path) -> tuple[list[str], Counter[str], int]:
    """Sorted paths of the images below ``root``, the other files counted by type, and the number of folders."""
    images: list[str] = []
    ignored: Counter[str] = Counter()
    # A link is followed last and only to a folder that is neither seen already nor above the root: rings end.
    seen = {_identity(parent) for parent in root.resolve().parents}
    folders, links, count = [""], list[str](), 0
    while folders or links:
        links.sort(reverse=True)
        prefix = folders.pop() if folders else links.pop()
        try:
            identity = _identity(root / prefix)
            entries = [] if identity in seen else list(os.scandir(root / prefix))
        except OSError:
            ignored["unreadable folder"] += 1
            continue
        count += identity not in seen
        seen.add(identity)
        for entry in entries:
            if _is_folder(entry):
                if entry.name.startswith("."):
                    ignored["hidden folder"] += 1
                else:
                    (links if entry.is_symlink() else folders).append(f"{prefix}{entry.name}/")
            elif _suffix(entry.name) in SUFFIXES and not entry.name.startswith("._"):
                images.append(prefix + entry.name)
            else:
                ignored[_type(entry.name)] += 1
    return sorted(images), ignored, count


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; the reader names it, if it is called an image
        return False


def _folders(paths: Sequence[str]) -> list[str] | None:
    """The folder of each path, below the deepest one that holds all paths; None if there are not two or more."""
    start = os.path.commonprefix([min(paths), max(paths)]).rfind("/") + 1  # noqa: RUF071 - cut at the last slash
    parts = [path[start:].partition("/") for path in paths]
    names = [folder for folder, slash, _ in parts if slash]
    return names if len(names) == len(paths) and len(set(names)) > 1 else None


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _type(name: str) -> str:
    """Under what an ignored file is counted."""
    if name.rpartition("/")[2].startswith("._"):
        return "._* (macOS)"
    suffix = _suffix(name)
    return f".{suffix}" if suffix.isalnum() and len(suffix) <= 8 else "no suffix"


# Lists ---------------------------------------------------------------------------------------------------------------


def _read_list(file: Path) -> list[tuple[str, str]]:
    """(path, label) of every entry, an empty label if there is none."""
    # Names on disk need not be UTF-8; a byte-order mark comes from spreadsheets.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        if file.suffix.lower() == ".txt":
            return [(line, "") for line in text.read().splitlines() if line.strip()]
        try:
            rows = [row for row in csv.reader(text) if row and row[0].strip()]
        except csv.Error as error:
            raise UserError(f"--data {file} is not a CSV file", why=str(error)) from None
    if rows and [cell.strip().lower() for cell in rows[0][:2]] in (["path"], ["path", "label"]):
        rows = rows[1:]
    return [(row[0], row[1].strip() if len(row) > 1 else "") for row in rows]


# Mistakes ------------------------------------------------------------------------------------------------------------


def _no_images(
    data: object, ignored: Counter[str], places: int, place: str = "folder", damaged: Sequence[ImageError] = ()
) -> UserError:
    found = ", ".join(f"{kind} {count}" for kind, count in ignored.most_common(5)) or "no files"
    hint = "convert the images, for example to .jpg" if ignored else None
    if ".tar" in ignored:
        hint = f"--data '{data}/NAME-{{0000..0099}}.tar'"
    return UserError(
        f"--data {data}: 0 images in {places} {place}{'s' * (places != 1)}",
        why=str(damaged[0]) if damaged else f"found {found}; readable types are {' '.join(SUFFIXES)}",
        hint=hint,
    )


def _not_a_source(data: str, path: Path, otherwise: str | None) -> UserError:
    if path.is_file():
        why = "a folder, a .txt or .csv list, or .tar files are expected"
        return UserError(f"--data {data} is a file of another type", why=why, hint="unpack it into a folder")
    folder = next(parent for parent in path.absolute().parents if os.access(parent, os.R_OK))
    nearby = {f"{name}/" if (folder / name).is_dir() else name for name in sorted(os.listdir(folder))}
    nearby = {name for name in nearby if name.endswith(("/", ".txt", ".csv", ".tar")) and not name.startswith(".")}
    wanted = path.absolute().relative_to(folder).parts[0]
    close = difflib.get_close_matches(wanted, sorted(nearby), n=3, cutoff=0.5)
    hint = otherwise
    if close:
        # Shown as the user would type it: relative if the mistake was.
        best = Path(*path.parts[: len(path.parts) - len(path.absolute().relative_to(folder).parts)], close[0])
        hint = f"--data {best}        (found here: {', '.join(close)})"
        hint += f"      or   {otherwise}" if otherwise else ""
    what = "file" if path.suffix else "folder"
    return UserError(f"--data {data}: no such {what}", hint=hint)


def _check_classes(data: str, part: str, train: list[str], held_out: list[str]) -> None:
    if not train or not held_out or train == held_out:
        return
    lost = {part: sorted(set(train) - set(held_out)), "train": sorted(set(held_out) - set(train))}
    missing = "; ".join(f"missing in {where}: {', '.join(names[:5])}" for where, names in lost.items() if names)
    raise UserError(
        f"--data {data}: train/ has {len(train)} classes, {part}/ has {len(held_out)}  ({missing})",
        hint=f"add the folders, or  --data {Path(data) / 'train'}  to leave {part}/ out",
    )


def _numbers_by_value(label: str) -> tuple[bool, int, str]:
    """Sorting key that puts 2 before 10, and numbers before names."""
    number = label.isdecimal() and len(label) < 19
    return not number, int(label) if number else 0, label


class _Strings:
    """Strings in one buffer: a million paths cost their bytes, and reading one changes no reference count."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start, end = self._ends[index : index + 2].tolist()
        return os.fsdecode(self._bytes[start:end])

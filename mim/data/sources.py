"""Where images come from: what ``--data`` names, opened as a sequence of images that any worker can read.

A folder (flat or nested), a list of files, or tar shards (``docs/data.md``). Only names are read until an image is
asked for. The index of a million images is a few flat arrays, which all loader workers share.
"""

import hashlib
import io
import os
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from mim.data.files import read_file
from mim.data.flat import FlatArray, Labels, Strings
from mim.data.folders import Unclear, class_home, folder_classes, holds_images, images_in, scan
from mim.data.images import Header, ImageError, read_header, read_image, stored_type
from mim.data.layouts import HELD_OUT, counted, find_layout, mask_folders, same_name, subfolders
from mim.data.loading import reading
from mim.data.pixels import EIGHT_BIT, Pixels
from mim.data.places import OTHERWISE, is_list, is_shards, no_images, not_a_source, token_parts
from mim.data.remote import RemoteShards, is_url
from mim.data.shards import LocalShards, Shards
from mim.data.tables import Table, read_list
from mim.data.tar_samples import sort_members
from mim.data.tokens import read_shard
from mim.errors import UserError, printable
from mim.program import called, quoted


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


class Examined(NamedTuple):
    """An image, and what else can be told of it.

    Attributes:
        image: ``(C, H, W)``.
        header: of its file.
        kind: type of the numbers in its file.
        digest: the same for copies.
    """

    image: Tensor
    header: Header
    kind: str
    digest: bytes


class FileSource(ABC):
    """A ``Source`` of image files, readable or not.

    Attributes:
        unit: what its items are called.
        pixels: what the files hold; 8 bit until somebody says otherwise.
        ignored: files that were passed over, counted by type.
        damaged: files that the index already knows to be unreadable; they are not counted in ``len``.
        unclear: why there are no labels although something looks like them.
        notes: what was found out about the layout, for the user.
        part: what messages call this part of the data; empty for all of it.
        tables: lists beside the images, which may know their labels.
    """

    unit = "images"

    def __init__(self, name: str, paths: Iterable[str], class_names: Sequence[str] | None, channels: int) -> None:
        self.name, self.channels = name, channels
        self.pixels: Pixels = EIGHT_BIT
        self._paths = Strings(paths)
        self.classes = sorted(set(class_names or ()), key=_numbers_by_value)
        index = {label: position for position, label in enumerate(self.classes)}
        self.labels: list[int] | None = None if class_names is None else Labels(index[label] for label in class_names)
        self.ignored: Counter[str] = Counter()
        self.damaged: list[ImageError] = []
        self.unclear: Unclear | None = None
        self.notes: list[str] = []
        self.part = ""
        self.tables: list[str] = []

    def findings(self) -> list[str]:
        """Lines for the user: what was found out about the layout, and why there are no labels if some seem to be."""
        masks = [f"{count:,} {kind}: not read" for kind, count in self.ignored.items() if kind.startswith("masks")]
        unclear = [f"no labels: {self.unclear.why}; {self.unclear.hint}"] if self.unclear and not self.labels else []
        return [*self.notes, *masks, *unclear]

    def drop_labels(self, reason: Unclear) -> None:
        """Takes the labels away if there are any."""
        if self.labels is not None:
            self.labels, self.classes, self.unclear = None, [], reason

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

    def fetch(self, indices: Sequence[int]) -> None:  # noqa: B027 - a disk needs nothing
        """Makes reading these images next quick, where that takes more than a disk."""

    def kind(self, index: int, image: Tensor) -> str:
        """Type of the numbers in the file that gave ``image``; raises ``ImageError``."""
        return stored_type(self.encoded(index), image, self.channels, self.pixels)

    def examine(self, index: int) -> Examined:
        """An image with its numbers as they are; what cannot be kept so, as a picture among pictures would be read.

        Raises:
            ImageError: if it cannot be read.
        """
        encoded, name = self.encoded(index), self.describe(index)
        try:
            content = encoded if isinstance(encoded, bytes) else read_file(encoded)
        except (OSError, ValueError) as error:
            raise ImageError(name, getattr(error, "strerror", None) or str(error)) from None
        try:
            image = read_image(content, self.channels, name, self.pixels)
        except ImageError as error:
            if error.channels is not None or self.pixels.bands:
                raise
            image = read_image(content, self.channels, name, EIGHT_BIT)
        header = read_header(content, self.channels, name, self.pixels)
        kind = stored_type(content, image, self.channels, self.pixels)
        return Examined(image, header, kind, hashlib.blake2b(content, digest_size=16).digest())

    @abstractmethod
    def encoded(self, index: int) -> Path | bytes:
        """The file, or its content; raises ``ImageError`` if there is none."""


class FolderSource(FileSource):
    """Every image below a folder but masks, sorted by path; labels as :func:`folder_classes` finds them.

    Args:
        root: the folder.
        channels: of the images.
        name: by default the folder's.
        label_column: number of the folder below it that is the class; found out unless given.
    """

    def __init__(self, root: Path, channels: int = 3, name: str | None = None, label_column: str | None = None) -> None:
        paths, ignored, folders = scan(root)
        if not paths:
            raise no_images(root, ignored, folders)
        class_names, unclear = folder_classes(paths, label_column)
        super().__init__(name or root.resolve().name, (f"{root}/{path}" for path in paths), class_names, channels)
        self.ignored, self.unclear = ignored, unclear
        self.tables = sorted(
            f"{root}/{table}" for table in os.listdir(root) if table.lower().endswith((".csv", ".tsv"))
        )
        if class_names is not None and label_column is None:
            home = root / paths[0][: class_home(paths)]
            empty = sorted(
                set(map(same_name, subfolders(home))) - set(class_names) - set(mask_folders(subfolders(home)))
            )
            self.notes += (
                [f"no images in {counted([f'{name}/' for name in empty])}: not among the classes"] if empty else []
            )

    def encoded(self, index: int) -> Path:
        """The file."""
        return Path(self._paths[index])


class ListSource(FileSource):
    """The images that a list names, in its order.

    Args:
        file: the list.
        channels: of the images.
        table: what it says, or a part of it; read by :func:`read_list` unless given.
    """

    def __init__(self, file: Path, channels: int = 3, table: Table | None = None) -> None:
        table = table or read_list(file)
        super().__init__(file.stem, table.paths, table.labels, channels)
        self.unclear, self.notes = table.unclear, list(table.notes)

    def encoded(self, index: int) -> Path:
        """The file."""
        return Path(self._paths[index])


class TarSource(FileSource):
    """The images in uncompressed tar files, in their order; nothing is ever extracted.

    Only ordinary members with an image's suffix count, and of several with one key the plain one: ``k.jpg``, not
    ``k.seg.png``. Labels come from ``k.cls`` or the ``label`` in ``k.json`` beside ``k.jpg`` (WebDataset), otherwise
    from the folders as in ``FolderSource``.

    Args:
        pattern: a tar file, or many with braces: ``train-{0000..0099}.tar``.
        channels: of the images.
        label_column: number of the folder that is the class; labels of their own are then passed over.
    """

    def __init__(self, pattern: str, channels: int = 3, label_column: str | None = None) -> None:
        shards: Shards = RemoteShards(pattern) if is_url(pattern) else LocalShards(pattern)
        damaged: list[ImageError] = []
        found = sort_members(shards.members(damaged), shards.content)
        images, ignored = found.images, found.ignored
        if not images:
            raise no_images(pattern, ignored, len(shards.names), "tar file", damaged)
        labels = {} if label_column else found.labels
        unclear = None
        if labels:
            damaged += [ImageError(i.path, "has no label, others have") for i in images if i.path not in labels]
            images = [image for image in images if image.path in labels]
            class_names: list[str] | None = [same_name(labels[image.path]) for image in images]
        else:
            class_names, unclear = folder_classes([image.name for image in images], label_column)
        name = Path(shards.names[0].partition("?")[0]).stem
        name = name if len(shards.names) == 1 else name.rstrip("-_0123456789")
        super().__init__(name, (image.path for image in images), class_names, channels)
        self.ignored, self.damaged, self._shards, self.unclear = ignored, damaged, shards, unclear
        if unclear is None and found.several:
            why = f"{found.several} holds several labels; probes know one per image"
            hint = f"{called('pretrain')} --data {shlex.quote(pattern)}   needs none; or one in each .json or .cls"
            self.unclear = Unclear(why, hint)
        number = {shard: number for number, shard in enumerate(shards.names)}
        places = [(number[i.shard], i.offset, i.size) for i in images]
        self._places = FlatArray(np.array(places, dtype=np.int64))  # (images, 3)

    def fetch(self, indices: Sequence[int]) -> None:
        """See :meth:`FileSource.fetch`."""
        self._shards.fetch([tuple(place) for place in self._places[list(indices)].tolist()])

    def encoded(self, index: int) -> bytes:
        """The member's content."""
        shard, offset, size = self._places[index].tolist()
        try:
            return self._shards.read(shard, offset, size)
        except OSError as error:
            raise ImageError(self.describe(index), error.strerror or str(error)) from None


class TokenSource(FileSource):
    """Images that are kept as tokens, drawn again by their tokenizer; to all else, 8-bit images like others.

    Args:
        folder: with the tokens, see :mod:`mim.data.tokens`.
        channels: that are wanted; the images are RGB.
        name: by default the folder's.
    """

    unit = "images of tokens"

    def __init__(self, folder: Path, channels: int = 3, name: str | None = None) -> None:
        if channels != 3:
            raise UserError(f"--data {folder}: tokens are of RGB images, the model takes {channels} channels")
        self._shard = read_shard(folder)
        labels = self._shard.labels
        names = None if labels is None else [self._shard.classes[label] for label in labels]
        paths = (f"{folder}#{index}" for index in range(len(self._shard.ids)))
        super().__init__(name or folder.resolve().name, paths, names, channels)
        if not len(self):
            raise UserError(f"--data {folder}: no images in these tokens")
        grid, tokenizer = self._shard.ids.shape[1:], self._shard.tokenizer
        self.notes.append(f"{grid[0]} x {grid[1]} tokens of {tokenizer.codes} codes, {tokenizer.stride} px each")

    def read(self, index: int) -> Tensor:
        """``(3, H, W)`` uint8."""
        return self._shard.picture(index)

    def encoded(self, index: int) -> bytes:
        """The drawn image as a PNG, for whoever looks at files."""
        content = io.BytesIO()
        Image.fromarray(self.read(index).permute(1, 2, 0).numpy()).save(content, "PNG")
        return content.getvalue()


def open_source(
    data: str,
    channels: int = 3,
    same_classes: bool = True,
    otherwise: str | None = OTHERWISE,
    label_column: str | None = None,
) -> tuple[FileSource, FileSource | None]:
    """What ``--data`` names: training images, and held-out ones if the data sets some apart.

    Args:
        data: a folder, a ``.txt``, ``.csv`` or ``.tsv`` list, a ``.tar`` file, or tar shards as
            ``train-{0000..0099}.tar``, on the disk or behind URLs. A folder with a training part and one to score
            gives both, whatever they are called (:data:`mim.data.layouts.PARTS`), as does a table with a column
            ``split``.
        channels: of the images.
        same_classes: refuse parts whose classes differ.
        otherwise: what to try if there is no such place.
        label_column: column of a table, or number of a folder's level, that holds the labels.

    Raises:
        UserError: if there is nothing to read, or the parts have different classes.
    """
    if is_url(data):
        return TarSource(data, channels, label_column), None
    path = Path(data).expanduser()
    if path.is_dir():
        train, held = _open_folder(path, channels, label_column)
    elif is_list(path):
        train, held = _open_list(path, channels, label_column)
    elif is_shards(path):
        return TarSource(str(path), channels, label_column), None
    else:
        raise not_a_source(data, path, otherwise)
    if held is not None and same_classes:
        _check_classes(data, train, held)
    return train, held


def _open_folder(path: Path, channels: int, label_column: str | None) -> tuple[FileSource, FileSource | None]:
    if parts := token_parts(path):
        return _open_tokens(path, parts, channels)
    layout, name = find_layout(path, holds_images), path.resolve().name
    train: FileSource = FolderSource(layout.train, channels, name, label_column)
    if layout.held_out is None:
        return train, None
    held: FileSource = FolderSource(layout.held_out, channels, name, label_column)
    train.part, held.part = f"{layout.train.name}/", f"{layout.part}/"
    masks = [mask.name for mask in layout.masks if next(images_in(mask, below=True), None)]
    train.notes += [f"{held.part} is held out: {len(held):,} images"]
    train.notes += [f"masks in {mask}/ are not read" for mask in masks]
    if layout.others:
        train.notes += [f"not read: {counted([f'{other}/' for other in layout.others])}"]
    if layout.train.parent.name.lower() == "leftimg8bit" and label_column is None:  # Cityscapes
        for part in (train, held):
            part.drop_labels(Unclear("the folders of Cityscapes are cities, not classes", "--label_column 1"))
    return train, held


def _open_tokens(path: Path, parts: Sequence[Path], channels: int) -> tuple[FileSource, FileSource | None]:
    train = TokenSource(parts[0], channels, path.resolve().name)
    held = TokenSource(parts[1], channels, path.resolve().name) if len(parts) > 1 else None
    if held is not None:
        train.part, held.part = (f"{part.name}/" for part in parts)
        train.notes += [f"{held.part} is held out: {len(held):,} images"]
    return train, held


def _open_list(file: Path, channels: int, label_column: str | None) -> tuple[FileSource, FileSource | None]:
    table = read_list(file, label_column)
    parts = table.parts or []
    held_out = next((part for part in HELD_OUT if part in parts), None)
    if "train" not in parts or held_out is None:
        return ListSource(file, channels, table), None
    train, held = (ListSource(file, channels, _rows_of(table, part)) for part in ("train", held_out))
    train.part, held.part = f"rows of train in {file.name}", f"rows of {held_out} in {file.name}"
    train.notes += [f"rows of {held_out} are held out: {len(held):,} images"]
    if rest := len(table.paths) - len(train) - len(held):
        train.notes += [f"not read: {rest:,} rows of other parts"]
    return train, held


def _rows_of(table: Table, part: str) -> Table:
    assert table.parts is not None
    rows = [row for row, own in enumerate(table.parts) if own == part]
    labels = table.labels and [table.labels[row] for row in rows]
    return table._replace(paths=[table.paths[row] for row in rows], labels=labels, parts=None)


# Mistakes ------------------------------------------------------------------------------------------------------------


def _check_classes(data: str, train: FileSource, held: FileSource) -> None:
    ours, theirs = train.classes, held.classes
    if not ours or not theirs or ours == theirs:
        return
    lost = {held.part: sorted(set(ours) - set(theirs)), train.part: sorted(set(theirs) - set(ours))}
    missing = "; ".join(
        f"missing in {where.rstrip('/')}: {', '.join(names[:5])}" for where, names in lost.items() if names
    )
    alone = Path(data) / train.part if train.part.endswith("/") else None
    raise UserError(
        f"--data {data}: {train.part} has {len(ours)} classes, {held.part} has {len(theirs)}  ({missing})",
        hint=f"--data {quoted(alone)}   leaves {held.part} out; or add the folders"
        if alone
        else "the same labels in both",
    )


def _numbers_by_value(label: str) -> tuple[bool, int, str]:
    """Sorting key that puts 2 before 10, and numbers before names."""
    number = label.isdecimal() and len(label) < 19
    return not number, int(label) if number else 0, label

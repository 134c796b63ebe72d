"""The images below a folder, and the classes that its folders stand for. Only names are read."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mim.data.files import SUFFIXES
from mim.data.layouts import (
    are_pieces,
    counted,
    is_junk,
    mask_folders,
    mask_twins,
    name_parts,
    part_of,
    same_inside,
    same_name,
)
from mim.errors import UserError

PACKED = ("gz", "bz2", "xz", "zst")
"""Endings that stand behind another one."""


class Unclear(NamedTuple):
    """Why images have no labels although something looks like them, and what to try."""

    why: str
    hint: str


class Found(NamedTuple):
    """What lies below a folder: sorted paths of the images, other files counted by type, number of folders."""

    images: list[str]
    ignored: Counter[str]
    folders: int


def scan(root: Path) -> Found:
    """The images below ``root`` but for masks; linked folders are followed once, unless they lead back."""
    images: list[str] = []
    ignored: Counter[str] = Counter()
    # A link is followed last and only to a folder that is neither seen already nor above the root: rings end.
    seen = {_identity(parent) for parent in root.resolve().parents}
    folders, links, count = [""], list[str](), 0
    masks: set[str] = set()
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
        inside = [entry.name for entry in entries if _is_folder(entry)]
        masks |= {f"{prefix}{name}/" for name in mask_folders(inside)}
        for entry in entries:
            if _is_folder(entry):
                if is_junk(entry.name):
                    ignored["hidden folder" if entry.name.startswith(".") else f"folder {entry.name}"] += 1
                else:
                    (links if entry.is_symlink() else folders).append(f"{prefix}{entry.name}/")
            elif is_image(entry.name):
                images.append(prefix + entry.name)
            else:
                ignored[file_type(entry.name)] += 1
    return Found(without_masks(sorted(images), ignored, masks), ignored, count)


def without_masks(images: list[str], ignored: Counter[str], masks: set[str]) -> list[str]:
    """The images outside the folders ``masks`` (with a slash at the end) and not called ``x_mask`` beside ``x``."""
    if masks:
        inside = [next((mask for mask in masks if image.startswith(mask)), "") for image in images]
        ignored.update(f"masks in {mask}" for mask in inside if mask)
        images = [image for image, mask in zip(images, inside, strict=True) if not mask]
    if twins := mask_twins(images):
        ignored["masks beside their images, such as " + min(twins)] += len(twins)
        images = [image for image in images if image not in twins]
    return images


def mask_folders_of(paths: Sequence[str]) -> set[str]:
    """Folders of masks, with a slash at the end, among the folders of the paths themselves, as in a tar file."""
    inside: dict[str, set[str]] = {}
    for folder in {path.rpartition("/")[0] for path in paths}:
        parts = folder.split("/") if folder else []
        for depth, name in enumerate(parts):
            inside.setdefault("".join(f"{part}/" for part in parts[:depth]), set()).add(name)
    return {f"{prefix}{name}/" for prefix, names in inside.items() for name in mask_folders(names)}


def images_in(folder: Path, below: bool = False) -> Iterator[Path]:
    """Image files in a folder, and below it if asked for, in no order."""
    for home, folders, files in os.walk(folder):
        yield from (Path(home, name) for name in files if is_image(name))
        if not below:
            return
        folders[:] = [name for name in folders if not is_junk(name)]


def holds_images(folder: Path) -> bool:
    """Whether images lie in the folder itself."""
    return next(images_in(folder), None) is not None


def folder_classes(paths: Sequence[str], level: str | None = None) -> tuple[list[str] | None, Unclear | None]:
    """The class that each path's folders stand for.

    Classes are the folders in which all images lie: below the deepest folder that holds every image, if there are two
    or more and no image lies beside them.

    Args:
        paths: sorted or not, with slashes.
        level: number of the folder that is the class, 1 for the first below that deepest one.

    Returns:
        A name per path, or None, and why folders that look like classes are not taken for them.

    Raises:
        UserError: if an image has no folder of that level.
    """
    start = class_home(paths)
    if level is not None:
        return _at_level([path[start:] for path in paths], level), None
    parts = [path[start:].partition("/") for path in paths]
    names = [same_name(folder) for folder, slash, _ in parts if slash]
    if len(set(names)) < 2:
        return None, None
    if len(names) != len(paths):
        return None, _strays([path for path, slash, _ in parts if not slash], sorted(set(names)), len(names))
    classes, rests = sorted(set(names)), [rest for *_, rest in parts]
    unclear = _parts_not_classes(classes) or _same_subfolders(names, rests) or _pieces_not_classes(classes)
    return (None, unclear) if unclear else (names, None)


def class_home(paths: Sequence[str]) -> int:
    """Length of the beginning that all paths share up to a slash: the folder in which classes would lie."""
    return os.path.commonprefix([min(paths), max(paths)]).rfind("/") + 1  # noqa: RUF071 - cut at the last slash


def _strays(beside: Sequence[str], folders: Sequence[str], inside: int) -> Unclear | None:
    """A few images beside many in folders are rather left over than a sign that folders mean nothing."""
    if 5 * len(beside) > inside:
        return None
    shown = counted([f"{folder}/" for folder in folders])
    more = f" and {len(beside) - 1:,} more images lie" if len(beside) > 1 else " lies"
    why = f"{beside[0]}{more} beside {shown}, so that folders are no classes"
    return Unclear(why, "move what lies beside them into a folder outside, if they are")


def _parts_not_classes(names: Sequence[str]) -> Unclear | None:
    if not (all(map(part_of, names)) or name_parts(names)):
        return None
    shown = counted([f"{name}/" for name in names])
    return Unclear(f"{shown} are parts of a data set, not classes", "--label_column 1   if they are the classes")


def _pieces_not_classes(names: Sequence[str]) -> Unclear | None:
    if not are_pieces(names):
        return None
    shown = counted([f"{name}/" for name in names])
    why = f"{shown} look like the numbered pieces of one set, not like classes"
    return Unclear(why, "--label_column 1   if they are the classes")


def _same_subfolders(names: Sequence[str], rests: Sequence[str]) -> Unclear | None:
    """Classes that hold the same folders, two or more, are rather domains or parts of which these are the classes."""
    inside: dict[str, set[str]] = {}
    for name, rest in zip(names, rests, strict=True):
        folder, slash, _ = rest.partition("/")
        if not slash:  # an image right in a folder: it is a class
            return None
        inside.setdefault(name, set()).add(folder)
    same = same_inside(inside)
    if not same:
        return None
    outer, inner = counted(sorted(inside)), counted(sorted(same))
    return Unclear(
        f"every folder ({outer}) holds the same folders ({inner}), so either could be the classes",
        f"--label_column 1   for {outer}   or   --label_column 2   for {inner}",
    )


def _at_level(paths: Sequence[str], level: str) -> list[str]:
    place = int(level) - 1 if level.isdecimal() else -1
    lost = next((path for path in paths if not 0 <= place < path.count("/")), None)
    if lost is not None:
        shown = " ".join(f"{n} {name}," for n, name in enumerate(lost.split("/")[:-1], 1)) or "no folder"
        raise UserError(
            f"--label_column {level}: not every image lies in such a folder",
            why=f"{lost} has {shown.rstrip(',')}",
            hint="--label_column 1" if "/" in lost and level != "1" else "leave --label_column out",
        )
    return [same_name(path.split("/")[place]) for path in paths]


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; the reader names it, if it is called an image
        return False


def is_image(name: str) -> bool:
    """Whether a file is called like an image; macOS puts ``._x.jpg`` beside ``x.jpg``, which is none."""
    return suffix_of(name) in SUFFIXES and not name.rpartition("/")[2].startswith("._")


def suffix_of(name: str) -> str:
    """What stands behind the last dot, in lower case."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def file_type(name: str) -> str:
    """Under what an ignored file is counted."""
    if name.rpartition("/")[2].startswith("._"):
        return "._* (macOS)"
    suffix = suffix_of(name)
    if suffix in PACKED and (inner := suffix_of(name[: -len(suffix) - 1])).isalnum() and len(inner) <= 8:
        return f".{inner}.{suffix}"
    return f".{suffix}" if suffix.isalnum() and len(suffix) <= 8 else "no suffix"

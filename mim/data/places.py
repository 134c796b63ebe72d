"""What ``--data`` may name, as far as names on the disk tell: judged before anything heavy is imported."""

import difflib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mim.data.files import MEDICAL, SUFFIXES, ImageError
from mim.data.folders import images_in, scan
from mim.data.remote import check_first_shard, is_url
from mim.data.shards import LocalShards
from mim.data.tables import read_list
from mim.errors import UserError
from mim.program import quoted

LISTS = (".txt", ".csv", ".tsv")
"""Endings of files that list images."""
OTHERWISE = "leave --data out for the built-in images"
"""What to try instead of a place that is not there."""
BUILT_IN = ("builtin", "shapes")
"""Images that come with this project, as ``--data`` names them."""
PREFIX = "python:"
"""How names of objects of Python begin that were handed over; no path does."""
MEASUREMENTS = {
    **dict.fromkeys((".dcm", ".dicom", ".ima"), "DICOM"),
    **dict.fromkeys((".h5", ".hdf5", ".hdf", ".nc"), "HDF5"),
    **dict.fromkeys((".zarr", ".zarray"), "Zarr"),
    **dict.fromkeys((".nii", ".nii.gz"), "NIfTI"),
    **dict.fromkeys((".fits", ".fit", ".fits.gz"), "FITS"),
    **dict.fromkeys((".nrrd", ".mha", ".mhd"), "NRRD and MetaImage"),
    **dict.fromkeys((".czi", ".nd2", ".lif", ".oib", ".mrc"), "the format of a microscope"),
}
"""Endings of files with numbers that are not read, and what they are called."""
AS_TIFF = "a TIFF or .npy file for each image, which keep the numbers (docs/data.md)"
TOKEN_PARTS = ("train", "val")
"""Folders below one of tokens that sets images apart."""
_SMALL = 1 << 20  # bytes of a list that is read for a look alone, and again for the run


def check_place(data: str, otherwise: str | None = OTHERWISE, label_column: str | None = None) -> None:
    """Refuses what cannot hold images: no such place, a file of another type, a folder or list without any.

    Args:
        data: a folder, list, or pattern of tar shards or of URLs of some.
        otherwise: what to try if there is no such place.
        label_column: column of a table that holds the labels.

    Raises:
        UserError: as opening it would.
    """
    path = Path(data).expanduser()
    if data in BUILT_IN or data.startswith(PREFIX):
        return
    if is_url(data):
        check_first_shard(data)
    elif path.is_dir():
        if (
            not token_parts(path)
            and next(images_in(path, below=True), None) is None
            and not (found := scan(path)).images
        ):
            raise no_images(path, found.ignored, found.folders)
    elif is_list(path):
        if path.stat().st_size <= _SMALL:
            read_list(path, label_column)
    elif is_shards(path):
        LocalShards(str(path))
    else:
        raise not_a_source(data, path, otherwise)


def check_folder_of_masks(data: str) -> None:
    """Refuses a folder that is not there, where images with masks are expected."""
    if is_url(data):
        hint = "a folder on this disk"
        raise UserError(f"--data {data}: images with masks are not read from a URL", hint=hint)
    if data not in BUILT_IN and not Path(data).expanduser().is_dir():
        hint = "--data builtin   or   --data shapes   for built-in masks"
        raise UserError(f"--data {data}: no such folder", hint=hint)


def token_parts(folder: Path) -> list[Path]:
    """The folders of tokens that a path names: itself, its two parts, or none."""
    if (folder / "tokens.json").is_file():
        return [folder]
    parts = [folder / part for part in TOKEN_PARTS]
    return parts if all((part / "tokens.json").is_file() for part in parts) else []


def is_list(path: Path) -> bool:
    """Whether this is a file that lists images."""
    return path.suffix.lower() in LISTS and path.is_file()


def is_shards(path: Path) -> bool:
    """Whether this is a tar file, or a pattern of some."""
    return path.suffix.lower() == ".tar" and (path.is_file() or "{" in str(path))


def no_images(
    data: object, ignored: Counter[str], places: int, place: str = "folder", damaged: Sequence[ImageError] = ()
) -> UserError:
    """What is told of folders or tar files without images, with what was found in them instead."""
    found = ", ".join(f"{kind} {count}" for kind, count in ignored.most_common(5)) or "no files"
    hint = "convert the images, for example to .jpg" if ignored else None
    why = f"found {found}; readable types are {' '.join(SUFFIXES)}"
    if ".tar" in ignored:
        hint = f"--data {quoted(_shards_in(Path(str(data)).expanduser()) or f'{data}/NAME-{{0000..0099}}.tar')}"
    elif kind := next(filter(None, map(_measurements, (str(data).rstrip("/"), *ignored))), None):  # Zarr is a folder
        why, hint = f"found {found}; {kind} is not read", MEDICAL if kind == "DICOM" else AS_TIFF
    return UserError(
        f"--data {data}: 0 images in {places} {place}{'s' * (places != 1)}",
        why=str(damaged[0]) if damaged else why,
        hint=hint,
    )


def _shards_in(folder: Path) -> str | None:
    """The first tar files right in a folder whose numbers follow each other, as ``--data`` names them."""
    names = sorted(path.name for path in folder.glob("*.tar"))
    numbered = re.fullmatch(r"(.*?)(\d+)\.tar", names[0]) if names else None
    if not numbered:
        return str(folder / names[0]) if names else None
    start, first = numbered.groups()
    last = int(first)
    while f"{start}{last + 1:0{len(first)}}.tar" in names:
        last += 1
    which = first if last == int(first) else f"{{{first}..{last:0{len(first)}}}}"
    return str(folder / f"{start}{which}.tar")


def not_a_source(data: str, path: Path, otherwise: str | None) -> UserError:
    """What is told of a place that is not there, or a file of another type, with what is called alike beside it."""
    if path.is_file():
        why = "a folder, a .txt, .csv or .tsv list, or .tar files are expected"
        packed = path.suffix.lower() in (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
        instead = "unpack it into a folder" if packed else f"--data {quoted(path.parent)}"
        if (kind := _measurements(path.name)) not in (None, "DICOM"):
            why, instead = f"{kind} is not read", AS_TIFF
        return UserError(f"--data {data} is a file of another type", why=why, hint=instead)
    folder = next(parent for parent in path.absolute().parents if os.access(parent, os.R_OK))
    nearby = {f"{name}/" if (folder / name).is_dir() else name for name in sorted(os.listdir(folder))}
    nearby = {name for name in nearby if name.endswith(("/", *LISTS, ".tar")) and not name.startswith(".")}
    wanted = path.absolute().relative_to(folder).parts[0]
    close = difflib.get_close_matches(wanted, sorted(nearby), n=3, cutoff=0.5)
    hint = otherwise
    if close:
        # Shown as the user would type it: relative if the mistake was.
        best = Path(*path.parts[: len(path.parts) - len(path.absolute().relative_to(folder).parts)], close[0])
        hint = f"--data {quoted(best)}        (found here: {', '.join(close)})"
        hint += f"      or   {otherwise}" if otherwise else ""
    what = "file" if path.suffix else "folder"
    return UserError(f"--data {data}: no such {what}", hint=hint)


def _measurements(name: str) -> str | None:
    """What files of numbers that are not read are called, by their ending."""
    return next((kind for suffix, kind in MEASUREMENTS.items() if name.lower().endswith(suffix)), None)

"""Lists of images: plain text, or tables as people export them, read by the names of their columns.

A table's delimiter, heading, index column, byte-order mark and Windows paths are recognised by what they lead to: a
path is what names a file. Where more than one column could be the label, none is taken, and the caller is told which.
"""

import csv
import io
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mim.data.folders import Unclear, is_image
from mim.data.layouts import counted, part_of, same_name
from mim.errors import UserError, printable
from mim.program import quoted

PATH_NAMES = ("path", "filepath", "filename", "file", "imagepath", "imagefile", "imagename", "image", "img", "imgpath")
"""Headings of the images' column, without case, spaces, lines and a plural's ``s``."""
LABEL_NAMES = ("label", "class", "target", "category", "classname", "labelname", "categoryname", "classid", "labelid")
"""Headings of the labels' column."""
PART_NAMES = ("split", "subset", "partition", "set", "dataset", "datasplit", "phase", "part", "fold")
"""Headings of the column that says which rows are for training."""

_ASKED = {
    **dict.fromkeys(("isvalid", "isval", "isvalidation", "valid", "val", "validation"), ("val", "train")),
    **dict.fromkeys(("istest", "test"), ("test", "train")),
    **dict.fromkeys(("istrain", "istraining", "train", "training"), ("train", "val")),
}
"""Headings of columns that ask whether a row belongs to a part: what yes means, and what no."""
_YES, _NO = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no", "")

EMPTY = "(empty)"
"""Class of rows without a label, where the column of labels is named by the user."""
_SAMPLE = 20
_DELIMITERS = ",;\t|"


class Table(NamedTuple):
    """What a list says, row by row.

    Args:
        paths: of the images; relative ones start at the list's folder.
        labels: their classes, if there are any; empty where a row has none.
        parts: train, val or test of each row, if the list says so.
        unclear: why there are no labels although a column looks like them.
        notes: what was found out, for the user.
    """

    paths: list[str]
    labels: list[str] | None = None
    parts: list[str] | None = None
    unclear: Unclear | None = None
    notes: tuple[str, ...] = ()


def read_list(file: Path, label_column: str | None = None) -> Table:
    """The images that a ``.txt``, ``.csv`` or ``.tsv`` file lists.

    Args:
        file: the list.
        label_column: heading of the column of labels, or its number from 1; found by its name unless given.

    Raises:
        UserError: if the file is no list of images, or the column is not there.
    """
    text, folder = _text(file), file.parent
    if file.suffix.lower() == ".txt":
        rows = _lines(text, folder)
    else:
        rows = [[_trimmed(folder, cell) for cell in row] for row in _rows(text, folder, file)]
    rows = _without_remarks([row for row in rows if any(row)], folder)
    if not rows:
        raise UserError(f"--data {file}: 0 images", why="the list is empty", hint="a path in each line")
    width = max(map(len, rows))
    columns = _Columns([row + [""] * (width - len(row)) for row in rows], file)
    return columns.table(label_column)


class _Columns:
    """The columns of a table, each under its heading or, failing that, its number from 1."""

    def __init__(self, rows: list[list[str]], file: Path) -> None:
        self.file, self.folder = file, file.parent
        self.headed = not any(is_image(cell) or _exists(self.folder, cell) for cell in rows[0])
        names = rows[0] if self.headed else [""] * len(rows[0])
        self.rows = rows[1:] if self.headed else rows
        self.names = [name or str(number) for number, name in enumerate(names, 1)]
        self.keys = [re.sub(r"[\W_]", "", name.lower()) for name in names]
        self.places = range(len(names))
        if not self.rows:
            raise UserError(f"--data {file}: 0 images", why="it has a heading only", hint="a row for each image")

    def table(self, label_column: str | None) -> Table:
        """Paths, labels and parts."""
        path = self._path_column()
        located = _locate(self.folder, self[path])
        self._refuse_lost(located, self.names[path])
        part = self._part_column(path)
        parts = None if part is None else self._parts_of(part)
        given = None if label_column is None else self._given(label_column)
        if given is not None:
            labels, empty = self._labels(given), self._labels(given).count("")
            note = (f"{empty:,} rows without a label are the class {EMPTY}",) if empty else ()
            return Table(located, [label or EMPTY for label in labels], parts, notes=(*note, *_repeated(located)))
        others = [place for place in self.places if place not in (path, part) and not self._is_index(place, path)]
        pictures = [place for place in others if self._holds_files(place)]
        notes = [f"column {self.names[place]} names other files and is not read" for place in pictures]
        found, unclear, more = self._find_labels([place for place in others if place not in pictures], path)
        if found is not None:
            unclear = _contradiction(located, found)
            found, more = (None, more) if unclear else (found, [*more, *_repeated(located)])
        return Table(located, found, parts, unclear, (*notes, *more))

    def __getitem__(self, place: int) -> list[str]:
        return [row[place] for row in self.rows]

    def _path_column(self) -> int:
        """The column that names files: by what is there, then by its heading, then by its cells."""
        found = [
            (sum(_exists(self.folder, cell) for cell in cells), sum(map(is_image, cells)))
            for cells in ([row[place] for row in self.rows[:_SAMPLE]] for place in self.places)
        ]
        known = [_rank(self.keys[place], PATH_NAMES) for place in self.places]
        best = max(self.places, key=lambda place: (found[place][0] > 0, known[place], found[place]))
        rivals = [place for place in self.places if found[place][0] and place != best and not known[best]]
        if rivals:
            raise UserError(
                f"--data {self.file}: columns {self.names[best]} and {self.names[rivals[0]]} both name files",
                why="one of them must be called path",
                hint=f"a first row such as  {','.join('path' if place == best else 'mask' for place in self.places)}",
            )
        return best

    def _refuse_lost(self, paths: Sequence[str], name: str) -> None:
        sample = paths[:_SAMPLE]
        if any(map(os.path.lexists, sample)):
            return
        why = f"relative paths start at the list's folder, {self.folder.resolve()}"
        if re.match(r"[A-Za-z]:[\\/]", os.path.relpath(sample[0], self.folder)):
            why = "they start at a drive of another machine; " + why
        elif not any(map(is_image, sample)):
            why = f"column {name} holds no file names; {why}"
        first, hint = printable(sample[0]), None
        if home := _home_of(os.path.relpath(sample[0], self.folder), self.folder):
            why = f"it is in {home}; {why}"
            hint = f"cp {quoted(self.file, home)}   then   --data {quoted(home / self.file.name)}"
        raise UserError(
            f"--data {self.file}: none of the first {len(sample)} files exists ({first})", why=why, hint=hint
        )

    def _part_column(self, path: int) -> int | None:
        """The column whose every cell is train, val or test; one called split that is not is refused."""
        for place in self.places:
            named = _rank(self.keys[place], PART_NAMES) or self._asks_for_part(place)
            if place == path or not (named or not self.headed):
                continue
            cells = set(self[place])
            if all(map(part_of, cells)) or self._asks_for_part(place):
                return place
            if self.keys[place] in ("split", "subset", "partition"):
                shown = counted(sorted(cell or "(empty)" for cell in cells if not part_of(cell)))
                raise UserError(
                    f"--data {self.file}: column {self.names[place]} does not say which images to train on",
                    why=f"it holds {shown}",
                    hint="train, val and test in that column, or take it out of the table",
                )
        return None

    def _asks_for_part(self, place: int) -> bool:
        """Whether a column answers ``is_valid``, ``is_test`` or ``is_train`` by true and false or 1 and 0."""
        cells = {cell.lower() for cell in self[place]}
        return self.keys[place] in _ASKED and len(cells) == 2 and cells <= {*_YES, *_NO}

    def _parts_of(self, place: int) -> list[str]:
        """``train``, ``val`` or ``test`` of each row."""
        if not self._asks_for_part(place):
            return [part_of(cell) or "" for cell in self[place]]
        yes, no = _ASKED[self.keys[place]]
        return [yes if cell.lower() in _YES else no for cell in self[place]]

    def _given(self, column: str) -> int:
        if column in self.names:
            return self.names.index(column)
        if column.isdecimal() and 1 <= int(column) <= len(self.names):
            return int(column) - 1
        found = ", ".join(self.names)
        raise UserError(
            f"--label_column {column}: {self.file} has no such column",
            why=f"it has {found}",
            hint=f"--label_column {self.names[-1]}",
        )

    def _is_index(self, place: int, path: int) -> bool:
        """Whether a column only counts the rows, as spreadsheets and pandas write them."""
        named = self.keys[place] in ("index", "id", "idx", "no", "unnamed0")
        if len(self.rows) < 2 or not (named or (self.keys[place] == "" and place < path)):
            return False
        first = self.rows[0][place]
        return first in ("0", "1") and all(row[place] == str(n) for n, row in enumerate(self.rows, int(first)))

    def _holds_files(self, place: int) -> bool:
        return all(is_image(row[place]) for row in self.rows[:_SAMPLE])

    def _find_labels(self, places: Sequence[int], path: int) -> tuple[list[str] | None, Unclear | None, list[str]]:
        """Labels, or why there are none, and what to say about them."""
        named = [place for place in places if _rank(self.keys[place], LABEL_NAMES)]
        chosen = self._one_of(named or list(places))
        if chosen is not None:
            labels = self._labels(chosen)
            note = [] if named or not self.headed else [f"labels from column {self.names[chosen]}"]
            unclear = (
                self._several(labels, chosen) or self._all_different(labels, chosen) or self._minus(labels, chosen)
            )
            if unclear or not any(labels):
                return None, unclear, []
            self._refuse_gaps(labels, chosen, path)
            return labels, None, note
        places = named or places
        if not places:
            return None, None, []
        ones = [self._ones(row, places) for row in self.rows]
        if all(one is not None and len(one) == 1 for one in ones):
            return [self.names[one[0]] for one in ones if one], None, ["labels from the column that is 1 in each row"]
        shown, first = counted([self.names[place] for place in places]), self.names[places[-1]]
        why = f"columns {shown} could each be the label"
        if all(one is not None for one in ones):
            why = f"columns {shown} give an image several labels, or none; probes know one per image"
        return None, Unclear(why, f"--label_column {_quoted(first)}"), []

    def _refuse_gaps(self, labels: Sequence[str], place: int, path: int) -> None:
        if "" in labels:
            name = printable(self.rows[labels.index("")][path])
            raise UserError(
                f"--data {self.file}: {name} has no label, others have",
                hint=f"--label_column {_quoted(self.names[place])}   takes those without as a class {EMPTY}",
            )

    def _one_of(self, places: Sequence[int]) -> int | None:
        """The only column, or of two that say the same, as a number and a name, the one in words."""
        if len(places) < 2:
            return places[0] if places else None
        groups = [len({(row[places[0]], row[place]) for row in self.rows}) for place in places[1:]]
        sizes = [len({row[place] for row in self.rows}) for place in places]
        if {*groups, *sizes} != {sizes[0]} or not 1 < sizes[0] < len(self.rows) or self._binary(places):
            return None
        return next((place for place in places if not self.rows[0][place].isdecimal()), places[0])

    def _binary(self, places: Sequence[int]) -> bool:
        return all(self._ones(row, places) is not None for row in self.rows)

    def _ones(self, row: Sequence[str], places: Sequence[int]) -> list[int] | None:
        """The columns that are 1 in a row of zeros and ones; None if it holds anything else."""
        if not {row[place] for place in places} <= {"0", "1", "0.0", "1.0", "-1", "-1.0", "", "True", "False"}:
            return None
        return [place for place in places if row[place] in ("1", "1.0", "True")]

    def _several(self, labels: Sequence[str], place: int) -> Unclear | None:
        """A reason if cells hold several labels: ``cat|dog`` where ``cat`` or ``dog`` stands alone elsewhere."""
        alone = set(labels)
        for cell in sorted(alone):
            parts = [part.strip(" '\"[]") for part in re.split(r"[|;,]", cell)]
            if len(parts) > 1 and (set(parts) & alone or cell.startswith("[")):
                why = f"column {self.names[place]} holds several labels ({printable(cell)}); probes know one per image"
                return Unclear(why, f"--label_column {_quoted(self.names[place])}   takes each combination as a class")
        return None

    def _all_different(self, labels: Sequence[str], place: int) -> Unclear | None:
        if len(labels) < _SAMPLE or len(set(labels)) < len(labels):
            return None
        name = self.names[place]
        return Unclear(f"column {name} has another value in every row", f"--label_column {_quoted(name)}   if it must")

    def _minus(self, labels: Sequence[str], place: int) -> Unclear | None:
        """Where classes count from 0, -1 means none in most programs."""
        if "-1" not in labels or not {"0", "1"} <= set(labels) or not all(map(_is_number, labels)):
            return None
        why = f"column {self.names[place]} counts classes from 0, and -1 is none of them in most programs"
        return Unclear(why, f"--label_column {_quoted(self.names[place])}   if -1 is a class, else take those rows out")

    def _labels(self, place: int) -> list[str]:
        return ["" if cell.lower() == "nan" else same_name(cell) for cell in self[place]]


def _without_remarks(rows: list[list[str]], folder: Path) -> list[list[str]]:
    """The rows behind lines at the top that begin with ``#``, unless such a line names a file."""
    first = next((n for n, row in enumerate(rows) if not row[0].startswith("#") or _exists(folder, row[0])), len(rows))
    return rows[first:]


def _contradiction(paths: Sequence[str], labels: Sequence[str]) -> Unclear | None:
    """A reason if an image is listed twice with different labels, as tables of boxes and of several labels do."""
    known: dict[str, str] = {}
    for path, label in zip(paths, labels, strict=True):
        if known.setdefault(path, label) != label:
            names = f"{known[path]} and {label}"
            why = f"{printable(path)} is listed as {names}: several labels; probes know one per image"
            return Unclear(why, "a list with one row for each image")
    return None


def _repeated(paths: Sequence[str]) -> list[str]:
    again = len(paths) - len(set(paths))
    return [f"{again:,} rows repeat an image, which may then be learnt from and scored"] if again else []


def _home_of(path: str, folder: Path) -> Path | None:
    """A folder near a list from which its first path leads to a file."""
    below = (home for depth in ("*", "*/*") for home in sorted(folder.glob(depth)))
    return next((home for home in (*below, folder.parent) if (home / path).is_file()), None)


def _is_number(cell: str) -> bool:
    return cell.removeprefix("-").isdecimal()


def _rank(key: str, names: Sequence[str]) -> int:
    """How early a heading stands among ``names``, the higher the earlier; 0 if it is none of them."""
    singular = key.removesuffix("s") if key not in names and not key.endswith("ss") else key
    singular = {"classe": "class", "categorie": "category"}.get(singular, singular)
    return len(names) - names.index(singular) if singular in names else 0


def _text(file: Path) -> str:
    """The file's text; names on disk need not be UTF-8, and spreadsheets put marks in front or write UTF-16."""
    data = file.read_bytes()
    try:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            return data.decode("utf-16")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {file} is not a list", why=str(error), hint="save it as UTF-8") from None
    return data.decode("utf-8-sig", errors="surrogateescape")


def _lines(text: str, folder: Path) -> list[list[str]]:
    """Paths, a line each, or paths and labels behind a space or tab, as in lists of ImageNet's kind."""
    lines = [line for line in text.splitlines() if line.strip()]
    sample = [line.rsplit(None, 1) for line in lines[:_SAMPLE]]
    whole = any(_exists(folder, line) for line in lines[:_SAMPLE])
    if not whole and all(len(parts) == 2 for parts in sample) and any(_exists(folder, parts[0]) for parts in sample):
        return [line.rsplit(None, 1) for line in lines]
    return [[line] for line in lines]


def _rows(text: str, folder: Path, file: Path) -> list[list[str]]:
    """The cells of a table with the delimiter that leads to files, or else to the most columns."""

    def reader(delimiter: str) -> Iterator[list[str]]:
        return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)

    def fitness(delimiter: str) -> tuple[bool, bool, int]:
        try:
            rows = [row for row in islice(reader(delimiter), _SAMPLE) if row]
        except csv.Error:
            return False, False, 0
        files = any(_exists(folder, cell) for row in rows for cell in row)
        return files, len(set(map(len, rows))) == 1, max(map(len, rows), default=0)

    try:
        return list(reader(max(_DELIMITERS, key=fitness)))
    except csv.Error as error:
        raise UserError(f"--data {file} is not a CSV file", why=str(error), hint="a path in each line") from None


def _locate(folder: Path, paths: Sequence[str]) -> list[str]:
    """Where the paths of a list lead, in the spelling that the disk has."""
    spell = _spelling(folder, paths[:_SAMPLE])
    located = [os.path.join(folder, spell(path)) for path in paths]
    return [path if path.isascii() or os.path.lexists(path) else _other_accents(path) for path in located]


def _spelling(folder: Path, sample: Sequence[str]) -> Callable[[str], str]:
    """Windows' backslashes become slashes if that is what leads to files."""

    def slashed(path: str) -> str:
        return path.replace("\\", "/")

    as_is = any(os.path.lexists(os.path.join(folder, path)) for path in sample)
    return slashed if not as_is and any(_exists(folder, path) for path in sample) else str


def _exists(folder: Path, cell: str) -> bool:
    """Whether a cell names a file; a class may be called like a folder beside the list."""
    places = [os.path.join(folder, path) for path in dict.fromkeys((cell, cell.replace("\\", "/"))) if path]
    return any(os.path.lexists(place) and not os.path.isdir(place) for place in places)


def _trimmed(folder: Path, cell: str) -> str:
    """The cell without blanks around it, unless they belong to a file's name."""
    return cell if cell == cell.strip() or _exists(folder, cell) else cell.strip()


def _other_accents(path: str) -> str:
    spellings = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    return next((other for other in spellings if os.path.lexists(other)), path)


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[\w.-]+", name) else f"'{name}'"

"""Data sets of Python: a torch ``Dataset``, one of Hugging Face or a list, handed over where ``--data`` is expected.

A run is made of settings, and settings are text. So an object gets a name that tells its class and length; settings
hold the name, and whoever opens it finds the object for as long as it is handed over. A resumed run therefore wants the
object again, and refuses another class or length.

An item is a picture (PIL, uint8 tensor ``(C, H, W)`` or ``(H, W)``, uint8 array ``(H, W, C)`` or ``(H, W)``, a path),
or a tuple or mapping with one. Labels come from ``targets`` (or ``labels``) beside the items, as torchvision's data
sets have them, from the second tensor of a ``TensorDataset``, or from a ``ClassLabel`` column: nothing is decoded.
"""

import sys
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from mim.data.images import ImageError, NoPictureError, read_picture
from mim.data.loading import reading
from mim.data.pixels import EIGHT_BIT
from mim.data.places import PREFIX
from mim.errors import UserError, printable
from mim.randomness import derive_seed, keyed_libraries

_HELD_OUT = ("validation", "val", "valid", "test")
_IMAGE_KEYS = ("image", "img", "images", "pixels")

_handed: dict[str, tuple[Any, str]] = {}
"""By name: an object, and a word that no other hand-over has."""


class ObjectSource:
    """A ``Source`` of the items of a data set.

    An item is read with all global generators keyed by its index: where the data set draws random numbers itself, they
    are the same in every epoch, which exact resuming needs. Crops and flips are ours.

    Args:
        items: have a length and give items by index.
        name: of the data set, for messages.
        channels: of the images.
        labels: of the items, any values that can be sorted; None if there are none.
        classes: names by label if labels are numbers from 0; from the labels unless given.
        token: stands for the contents, which have no file whose time could tell of a change.
    """

    _alone: ClassVar = threading.Lock()  # nobody promises that a data set may be read by several threads
    damaged: tuple[ImageError, ...] = ()

    def __init__(
        self,
        items: Any,  # noqa: ANN401 - whatever has a length and items
        name: str,
        channels: int,
        labels: Sequence[Any] | None = None,
        classes: Sequence[str] | None = None,
        token: str = "",
    ) -> None:
        self.items, self.name, self.channels, self.token = items, name, channels, token
        self.ignored: Counter[str] = Counter()
        self.labels, self.classes = _numbered(labels, classes, name, len(items))
        self.part, self.pixels = "", EIGHT_BIT
        self._check_kind()

    def findings(self) -> list[str]:
        """Lines for the user about its layout, of which it has none."""
        return []

    def __len__(self) -> int:
        """Number of images."""
        return len(self.items)

    def describe(self, index: int) -> str:
        """The item as messages call it."""
        return f"{self.name}[{index}]"

    def read(self, index: int) -> Tensor:
        """``(C, H, W)`` uint8; raises ``ImageError``, whatever the data set has raised."""
        try:
            return self._read(index)
        except ImageError:
            raise
        except Exception as error:  # code of the user's may raise anything
            reason = printable(f"{type(error).__name__}: {error}".partition("\n")[0])[:200]
            raise ImageError(self.describe(index), reason) from error

    def _read(self, index: int) -> Tensor:
        name = self.describe(index)
        with self._alone, reading(name), keyed_libraries("item", index), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed("item", index))
            item = self.items[index]
        return read_picture(_picture(item), self.channels, name, self.pixels)

    def _check_kind(self) -> None:
        """Refuses a data set whose first item cannot be a picture, before every item is called unreadable."""
        try:
            self._read(0)
        except NoPictureError as error:
            raise UserError(
                f"--data {self.name}: {error}",
                why="cropping, flipping and normalising are done here, on uint8 pixels",
                hint="a data set without a transform, which gives PIL images or uint8 tensors (C, H, W)",
            ) from error
        except Exception:  # an unreadable image, which is counted when its turn comes
            return


@contextmanager
def handed_over(data: object) -> Iterator[str]:
    """Gives what ``--data`` is to be inside: the text itself, or the name of the object that was given.

    Raises:
        UserError: for what is neither a text nor a data set with a length and items.
    """
    if isinstance(data, str | Path):
        yield str(data)
        return
    name = _name(data)
    _handed[name] = (data, uuid.uuid4().hex)
    try:
        yield name
    finally:
        del _handed[name]


def is_object(data: str) -> bool:
    """Whether ``--data`` names an object of Python."""
    return data.startswith(PREFIX)


def short_name(data: str) -> str:
    """The class of the object that ``data`` names."""
    return data.removeprefix(PREFIX).partition("[")[0].rpartition(".")[2]


def open_object(data: str, channels: int) -> tuple[ObjectSource, ObjectSource | None]:
    """The images of a handed-over object, and those that it sets apart.

    Raises:
        UserError: if it is not at hand, or holds no images.
    """
    if data not in _handed:
        raise UserError(
            f"--data {data} is an object of Python, which is not at hand",
            why="settings hold its class and length only",
            hint="mim.pretrain(resume=RUN, data=OBJECT) in Python, with the same data set",
        )
    given, token = _handed[data]
    name = short_name(data)
    parts = _splits(given) or (given, None)
    train, held = (None if part is None else _source(part, name, channels, token) for part in parts)
    assert train is not None
    return train, held


def _name(data: object) -> str:
    kind = f"{type(data).__module__}.{type(data).__qualname__}"
    splits = _hugging_face("DatasetDict")
    try:
        if splits is not None and isinstance(data, splits):
            return f"{PREFIX}{kind}[{','.join(f'{part}={len(data[part])}' for part in data)}]"
        count = len(data)  # type: ignore[arg-type]  # what has none raises
        if not hasattr(data, "__getitem__") or isinstance(data, Mapping):
            raise TypeError("it has no items by number")
    except (TypeError, NotImplementedError) as error:
        why = f"{error}; order and resuming need a length and items by number"
        raise UserError(f"data={kind} is not a data set", why=why, hint="a torch Dataset, or a folder") from error
    if not count:
        raise UserError(f"data={kind} is empty", hint="a data set with images, or a folder")
    return f"{PREFIX}{kind}[{count}]"


def _source(data: Any, name: str, channels: int, token: str) -> ObjectSource:  # noqa: ANN401 - a data set
    single = _hugging_face("Dataset")
    if single is not None and isinstance(data, single):
        items = _Encoded(data, name)
        labels = None if items.label is None else list(data[items.label])
        classes = None if items.label is None else data.features[items.label].names
        return ObjectSource(items, name, channels, labels, classes, token)
    source = ObjectSource(data, name, channels, _labels(data), _classes(data), token)
    if source.labels is None and _is_pair(data):
        source.ignored["labels that come with the images, since the data set has no `targets`"] = len(data)
    return source


def _picture(item: object) -> object:
    """The picture in an item."""
    if isinstance(item, Mapping):
        key = next((key for key in _IMAGE_KEYS if key in item), None)
        if key is None:
            raise NoPictureError(f"an item has {', '.join(map(str, item))}, none of {', '.join(_IMAGE_KEYS)}")
        return item[key]
    return item[0] if isinstance(item, tuple | list) and item else item


def _is_pair(data: Any) -> bool:  # noqa: ANN401 - a data set
    try:
        item = data[0]
    except Exception:  # counted when its turn comes
        return False
    return isinstance(item, tuple | list) and len(item) > 1


# Labels --------------------------------------------------------------------------------------------------------------


def _labels(data: Any) -> list[Any] | None:  # noqa: ANN401 - a data set
    """A label for each item, if they can be had without reading any."""
    if isinstance(data, Subset):
        whole = _labels(data.dataset)
        return whole and [whole[index] for index in data.indices]
    if isinstance(data, ConcatDataset):
        parts = [_labels(part) for part in data.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part or ()]
    if isinstance(data, TensorDataset):
        second = data.tensors[1] if len(data.tensors) > 1 else None
        known = second is not None and second.ndim == 1 and not second.is_floating_point()
        return second.tolist() if known and second is not None else None
    found = next((getattr(data, name) for name in ("targets", "labels") if hasattr(data, name)), None)
    if found is None or callable(found):
        return None
    return list(found.tolist() if hasattr(found, "tolist") else found)


def _classes(data: Any) -> Sequence[str] | None:  # noqa: ANN401 - a data set
    while isinstance(data, Subset):
        data = data.dataset
    classes = getattr(data, "classes", None)
    return classes if isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes) else None


def _numbered(
    labels: Sequence[Any] | None, classes: Sequence[str] | None, name: str, count: int
) -> tuple[list[int] | None, list[str]]:
    """Labels as numbers from 0, and the names of the classes; none if an item has none, or a negative one."""
    if labels is None:
        return None, []
    if len(labels) != count:
        raise UserError(f"--data {name}: {len(labels):,} labels for {count:,} images", hint="a label for each image")
    plain = [label.item() if hasattr(label, "item") else label for label in labels]
    if not all(isinstance(label, str) or (isinstance(label, int) and label >= 0) for label in plain):
        return None, []
    if classes is not None and all(isinstance(label, int) and label < len(classes) for label in plain):
        return plain, list(classes)
    found = sorted(set(plain), key=lambda label: (isinstance(label, str), label))
    number = {label: place for place, label in enumerate(found)}
    return [number[label] for label in plain], [str(label) for label in found]


# Hugging Face --------------------------------------------------------------------------------------------------------


class _Encoded:
    """The image files in a data set of Hugging Face, as they are: our reader decodes them, and tells what is wrong."""

    def __init__(self, data: Any, name: str) -> None:  # noqa: ANN401 - a datasets.Dataset
        import datasets

        kinds = {column: type(kind).__name__ for column, kind in data.features.items()}
        column = next((column for column, kind in kinds.items() if kind == "Image"), None)
        if column is None:
            columns = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
            hint = "data.cast_column(NAME, datasets.Image())"
            raise UserError(f"--data {name} has no column of images", why=f"its columns are {columns}", hint=hint)
        if data.format["type"] == "custom":
            why = "cropping, flipping and normalising are done here"
            raise UserError(
                f"--data {name} has a transform, which would not be applied", why=why, hint="reset_format()"
            )
        self.column = column
        self.label = next((column for column, kind in kinds.items() if kind == "ClassLabel"), None)
        encoded = data.with_format(None).cast_column(column, datasets.Image(decode=False))
        self.rows = encoded.select_columns([column])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> bytes | Path:
        cell = self.rows[index][self.column]
        if cell is None:
            raise ValueError("there is no image in this row")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"])


def _hugging_face(kind: str) -> Any:  # noqa: ANN401 - a class
    """A class of ``datasets``, if anybody has imported it: there is no object of it otherwise."""
    return getattr(sys.modules.get("datasets"), kind, None)


def _splits(data: Any) -> tuple[Any, Any] | None:  # noqa: ANN401 - data sets
    """What a dictionary of data sets holds to train on and apart; None for anything else."""
    kind = _hugging_face("DatasetDict")
    if kind is None or not isinstance(data, kind):
        return None
    if "train" not in data:
        raise UserError(f"data has the splits {', '.join(data)}, none of them train", hint="data=splits['NAME']")
    return data["train"], next((data[part] for part in _HELD_OUT if part in data), None)

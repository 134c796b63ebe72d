"""How people lay out images: which folders are parts (train, val, test), which hold masks, which are no data at all.

Folders are judged by the words in their names, without case: ``Training``, ``seg_train``, ``train2017`` and
``train_images`` are all the training part. Nothing is opened.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

PARTS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval", "evaluation", "holdout"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
    # Spanish and Portuguese, French, Italian, German, Russian, Chinese, Japanese, Korean; accents are taken away.
    **dict.fromkeys(
        ("entrenamiento", "treino", "treinamento", "entrainement", "apprentissage", "addestramento"), "train"
    ),
    **dict.fromkeys(
        ("allenamento", "trainingsdaten", "lerndaten", "обучение", "训练", "訓練", "学習", "훈련", "학습"), "train"
    ),
    **dict.fromkeys(("validacion", "validacao", "convalida", "validierung", "validierungsdaten", "валидация"), "val"),
    **dict.fromkeys(("验证", "驗證", "検証", "검증"), "val"),
    **dict.fromkeys(
        ("prueba", "pruebas", "teste", "testes", "testdaten", "тест", "测试", "測試", "テスト", "테스트"), "test"
    ),
}
"""Words that name a part of a data set, by the part that they mean."""
HELD_OUT = ("val", "test")
"""Parts that are scored; the first that is there wins."""
JUNK = ("@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "lost+found", "__pycache__")
"""Folders, in lower case, of thumbnails and waste that systems leave among people's files."""

_PLAIN_NAMES = ("train", "val", "valid", "validation", "test")
"""Names that win over others of the same meaning."""
_IMAGE_WORDS = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures"}
_MASK_WORDS = {
    *("mask", "masks", "annotation", "annotations", "annot", "annots", "label", "labels"),
    *("gt", "groundtruth", "segmentation", "segmentations"),
}
_WHOLE_NAMES = {
    "jpegimages": ["images"],
    "leftimg8bit": ["images"],
    "gtfine": ["masks"],
    "gtcoarse": ["masks"],
    "ground_truth": ["masks"],
    "trainannot": ["train", "masks"],
    "valannot": ["val", "masks"],
    "testannot": ["test", "masks"],
}
_FILLERS = _IMAGE_WORDS | {"set", "data", "dataset", "split", "part", "seg"}
_PIECES = _FILLERS | {
    "parts",
    "batch",
    "fold",
    "chunk",
    "shard",
    "subset",
    "dir",
    "folder",
    "archive",
    "volume",
    "disk",
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W\d_]+")
_TWIN = re.compile(r"(.+)[ _-](?:mask|masks|seg|segmentation|gt|groundtruth)(?:[ _-]?\d+)?\.[^./]+", re.IGNORECASE)


def part_of(name: str) -> str | None:
    """``train``, ``val`` or ``test`` if that is what a folder, list or cell is called."""
    words = [_without_set(word) for word in _words(name) if word not in _FILLERS and not word.isdecimal()]
    return PARTS.get(words[0]) if len(words) == 1 else None


def are_pieces(names: Sequence[str]) -> bool:
    """Whether folders are the numbered pieces of one set, as ``images_001`` and ``images_002``; not ``1`` and ``2``."""
    kinds = {tuple(word for word in _words(name) if not _counts(word)) for name in names}
    return len(names) > 1 and len(kinds) == 1 and bool(_PIECES & set(*kinds))


def name_parts(names: Sequence[str]) -> bool:
    """Whether every name has one word for a part in it and they name two parts or more: ``trainA``, ``testA``."""
    found = [{PARTS[word] for word in map(_without_set, _words(name)) if word in PARTS} for name in names]
    return all(len(parts) == 1 for parts in found) and len(set.union(*found)) > 1


def _counts(word: str) -> bool:
    return word.isdecimal() or (len(word) == 1 and word.isascii())


def find_parts(names: Iterable[str]) -> tuple[str, str] | None:
    """The names of the training and of the held-out part, if there is one of the first and one to score."""
    by_part: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (name not in _PLAIN_NAMES, name)):
        by_part.setdefault(part_of(name) or "", []).append(name)
    train = by_part.get("train", [])
    held_out = next((by_part[part] for part in HELD_OUT if part in by_part), [])
    if not train or not held_out or (len(train) > 1 and train[0] not in _PLAIN_NAMES):
        return None
    return train[0], held_out[0]


def mask_folders(names: Iterable[str]) -> dict[str, str]:
    """Folders that hold masks, each with the folder of its images among ``names``.

    ``masks``, ``labels``, ``annotations``, ``SegmentationClass`` or ``gtFine`` beside ``images``, ``JPEGImages`` or
    ``leftImg8bit``; ``train_masks`` beside ``train_images`` or ``train``.
    """
    words = {name: _whole_words(name) for name in sorted(names)}
    images = {name: own for name, own in words.items() if not _MASK_WORDS & set(own)}
    called_images = [name for name, own in images.items() if _IMAGE_WORDS & set(own)]
    found = {}
    for name in sorted(set(words) - set(images)):
        rest = _bare(words[name])
        # A name without a word for images must be a part: "face" beside "face_mask" are two classes.
        equal = [other for other in images if _bare(images[other]) == rest]
        equal = [other for other in equal if other in called_images or (len(rest) == 1 and rest[0] in PARTS)]
        if not rest and len(called_images) == 1:
            equal = called_images
        if equal:
            found[name] = equal[0]
    return found


def mask_twins(paths: Iterable[str]) -> set[str]:
    """Those of the paths that are called like another one with ``_mask`` behind its name."""
    matches = [(path, match) for path in paths if (match := _TWIN.fullmatch(path))]
    if not matches:
        return set()
    known = {path.rpartition(".")[0] for path in paths}
    return {path for path, match in matches if match[1] in known}


def is_junk(name: str) -> bool:
    """Whether a folder is hidden or left behind by a system."""
    return name.startswith(".") or name.lower() in JUNK


def same_name(name: str) -> str:
    """The name in one spelling of its accents: systems write them as one character, as two, or not in UTF-8."""
    if name.isascii():
        return name
    if any("\udc80" <= letter <= "\udcff" for letter in name):  # bytes that are no UTF-8
        name = os.fsencode(name).decode("cp1252", errors="replace")
    return unicodedata.normalize("NFC", name)


class Layout(NamedTuple):
    """The parts of a data set.

    Args:
        train: folder to learn from.
        held_out: folder to score, if one is set apart.
        part: what the held-out folder is called.
        masks: folders of masks that were passed over on the way.
        others: folders beside the parts that are not read.
    """

    train: Path
    held_out: Path | None = None
    part: str = ""
    masks: tuple[Path, ...] = ()
    others: tuple[str, ...] = ()


def find_layout(root: Path, holds_images: Callable[[Path], bool]) -> Layout:
    """Goes down from ``root``, past masks and lone folders, to the parts of a data set; ``root`` itself if it has none.

    Args:
        root: what the user named.
        holds_images: whether images lie in a folder itself.
    """
    folder, passed = root, list[Path]()
    for _ in range(8):  # a lone folder may be a link to the one above
        names = subfolders(folder)
        masks = mask_folders(names)
        passed += [folder / name for name in masks]
        names = [name for name in names if name not in masks]
        if parts := find_parts(names):
            others = tuple(name for name in names if name not in parts)
            return Layout(folder / parts[0], folder / parts[1], parts[1], tuple(passed), others)
        inside = sorted(set(masks.values())) or names
        if len(inside) != 1 or holds_images(folder):
            break
        folder /= inside[0]
    return Layout(root)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder that may hold data."""
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_junk(path.name))
    except OSError:
        return []


def same_inside(groups: dict[str, set[str]]) -> set[str]:
    """What all groups hold, if that is two or more and at least half of everything: then groups are no classes."""
    common, everything = set.intersection(*groups.values()), set.union(*groups.values())
    return common if len(common) >= 2 and 2 * len(common) >= len(everything) else set()


def counted(names: Sequence[str], most: int = 3) -> str:
    """``a, b, c and 4 more``."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _whole_words(name: str) -> list[str]:
    lower = name.lower()
    if lower.startswith("segmentation") and lower != "segmentation":
        return ["masks"]
    return _WHOLE_NAMES.get(lower) or _words(name)


def _words(name: str) -> list[str]:
    if not name.isascii():
        letters = unicodedata.normalize("NFKD", name)
        name = unicodedata.normalize("NFC", "".join(letter for letter in letters if not "\u0300" <= letter <= "\u036f"))
    return [word.lower() for word in _WORD.findall(name)]


def _bare(words: Iterable[str]) -> list[str]:
    return [word for word in words if word not in _MASK_WORDS | _IMAGE_WORDS]


def _without_set(word: str) -> str:
    short = word.removesuffix("set").removesuffix("集").removesuffix("データ").removesuffix("用")
    return short if short in PARTS else word

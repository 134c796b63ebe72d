"""Which mask belongs to which image: the layouts in which images lie beside masks.

The first that fits, in the folder itself or in a lone folder below it:

- Pascal VOC and CVAT: ``JPEGImages``, ``SegmentationClass`` and lists in ``ImageSets/Segmentation``.
- Cityscapes: ``leftImg8bit`` and ``gtFine``; of the ``labelIds`` the 19 classes that are scored.
- ``images`` beside ``masks``, ``annotations`` or ``labels``, each with a folder per part, or without parts; ADE20K is
  ``annotations/training``, where 0 is "other" and not scored.
- parts as ``train`` and ``val``, each with ``images`` and ``masks`` in it or with ``train_masks`` beside it.

A mask belongs to the image of the same name in the same subfolder, whatever its suffix; ``x_mask`` belongs to ``x``.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from mim.data.folders import scan
from mim.data.layouts import find_parts, mask_folders, part_of, same_name, subfolders
from mim.errors import UserError
from mim.program import called, quoted
from mim.randomness import keyed_generator

Pair = tuple[Path, Path]
"""An image and its mask."""

CITYSCAPES = {
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
"""The classes of Cityscapes that are scored, by their number in ``labelIds``."""

_MASK_SUFFIX = re.compile(
    r"(?:_leftImg8bit|_gtFine_labelIds|_gtFine_labelTrainIds|[ _-](?:mask|masks|seg|segmentation|gt|label|labels))$",
    re.IGNORECASE,
)


class Pairs(NamedTuple):
    """Images with masks in their parts.

    Args:
        train: to learn from.
        test: to be scored.
        split: what the scored part is called.
        zero_is_other: 0 is ADE20K's "other".
        names: classes by number in the mask, where the layout says so.
        ignore: numbers that the layout does not score.
        notes: what was found out, for the user.
    """

    train: list[Pair]
    test: list[Pair]
    split: str
    zero_is_other: bool = False
    names: Mapping[int, str] = MappingProxyType({})
    ignore: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def find_pairs(root: Path, split: str | None, val_fraction: float) -> Pairs:
    """Images and masks below ``root`` in one of the layouts above.

    Args:
        root: the folder.
        split: part that is scored; the first held-out part unless given.
        val_fraction: share that is held out where no part is.

    Raises:
        UserError: if there are none, or an image lacks its mask.
    """
    folder = root
    for _ in range(8):  # a lone folder may be a link to the one above
        names = subfolders(folder)
        if "SegmentationClass" in names:
            return _listed(folder, split, val_fraction)
        if {"leftImg8bit", "gtFine"} <= set(names):
            return _cityscapes(folder, split)
        if masks := _halves(folder):
            return _of_halves(folder, masks, split, val_fraction)
        if any(_halves(folder / name) for name in names if part_of(name)):
            train, held = _parts(folder, names, split)
            return _joined([_within(folder / part) for part in (train, held)], held)
        if len(names) != 1:
            break
        folder /= names[0]
    raise _no_pairs(root)


def _halves(folder: Path) -> dict[str, str]:
    """Folders of images in ``folder``, each with the folder of its masks: the first of several that holds any."""
    by_images: dict[str, list[str]] = {}
    for mask, image in mask_folders(subfolders(folder)).items():
        by_images.setdefault(image, []).append(mask)
    preferred = {
        image: sorted(masks, key=lambda mask: (not scan(folder / mask).images, "mask" not in mask.lower(), mask))
        for image, masks in by_images.items()
    }
    return {image: masks[0] for image, masks in preferred.items()}


def _of_halves(folder: Path, halves: dict[str, str], split: str | None, val_fraction: float) -> Pairs:
    """Parts of a folder that holds images beside masks: within both halves, in pairs of halves, or none."""
    if len(halves) > 1:
        train, held = _parts(folder, list(halves), split)
        return _joined([_matched(folder / part, folder / halves[part]) for part in (train, held)], held)
    ((image, mask),) = halves.items()
    images, masks = folder / image, folder / mask
    inside = subfolders(images)
    if split is None and find_parts(inside) is None:
        return _held_out(_matched(images, masks), val_fraction)
    train, held = _parts(images, inside, split)
    parts = [_matched(images / part, masks / _same_part(part, masks)) for part in (train, held)]
    return _joined(parts, held)._replace(zero_is_other=(mask, train) == ("annotations", "training"))


def _same_part(part: str, masks: Path) -> str:
    """The folder of masks of a part, which may be spelt otherwise."""
    own = subfolders(masks)
    return part if part in own else next((name for name in own if part_of(name) == part_of(part)), part)


def _parts(folder: Path, names: Sequence[str], split: str | None) -> tuple[str, str]:
    """Names of the training part and of the part that is scored."""
    found = find_parts(names)
    train = found[0] if found else next((name for name in names if part_of(name) == "train"), None)
    held = split or (found[1] if found else None)
    if split is not None and split not in names:
        held = next((name for name in names if part_of(name) and part_of(name) == part_of(split)), None)
    if train is None or held is None:
        others = [found[1]] if found else [name for name in names if name != train]
        raise UserError(
            f"--data {folder}: no part {split or 'to score'} beside {train or 'one to train on'}",
            why=f"found {', '.join(f'{name}/' for name in names[:6])}",
            hint=f"--split {quoted(others[0])}" if train and others else f"{folder}/train and {folder}/val",
        )
    return train, held


def _within(part: Path) -> tuple[list[Pair], list[str]]:
    """The pairs of a part that holds images and masks itself."""
    halves = _halves(part)
    if not halves:
        raise UserError(f"{part}: no images beside masks", hint=f"{part}/images and {part}/masks")
    image, mask = next(iter(halves.items()))
    return _matched(part / image, part / mask)


def _joined(parts: Sequence[tuple[list[Pair], list[str]]], split: str) -> Pairs:
    (train, notes), (test, more) = parts
    return Pairs(train, test, split, notes=(*notes, *more))


def _held_out(found: tuple[list[Pair], list[str]], share: float) -> Pairs:
    """A part held out by a key, for data without parts."""
    pairs, notes = found
    count = max(1, round(share * len(pairs)))
    if len(pairs) < 2:
        raise UserError("one image with a mask cannot be learnt from and scored, too", hint="two images or more")
    order = torch.randperm(len(pairs), generator=keyed_generator("segmentation", "held out")).tolist()
    held = set(order[:count])
    test = [pairs[place] for place in sorted(held)]
    train = [pair for place, pair in enumerate(pairs) if place not in held]
    return Pairs(train, test, "images held out by a key", notes=tuple(notes))


def _matched(images: Path, masks: Path) -> tuple[list[Pair], list[str]]:
    """Images and masks of the same name, in the order of the images, and what to say about the others."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder", hint="images and masks lie side by side, in images/ and masks/"
            )
    return _paired(_named(images), _named(masks), masks)


def _named(folder: Path, ending: str = "") -> dict[str, Path]:
    """Files by their path below ``folder`` without suffix, and without ``_mask`` unless that is another's name."""
    found: dict[str, Path] = {}
    paths = [path for path in scan(folder).images if path.rpartition(".")[0].endswith(ending)]
    for path in paths:
        name = same_name(path.rpartition(".")[0])
        short = _MASK_SUFFIX.sub("", name)
        name = short if short not in found else name
        if name in found:
            raise UserError(
                f"{folder / path} and {found[name].name} stand for the same image",
                why="files are matched by their names without suffix",
                hint=f"take one of them out of {folder}",
            )
        found[name] = folder / path
    return found


def _paired(images: dict[str, Path], masks: dict[str, Path], home: Path) -> tuple[list[Pair], list[str]]:
    lost = [image for name, image in images.items() if name not in masks]
    if not images or lost:
        first = lost[0] if lost else home
        raise UserError(
            f"{len(lost)} of {len(images)} images have no mask in {home}",
            why=f"first: {first}",
            hint=f"add {home / first.with_suffix('.png').name}   or remove the image",
        )
    spare = len(masks) - len(images)
    notes = [f"{spare:,} masks in {home} have no image and are not read"] if spare else []
    return [(image, masks[name]) for name, image in images.items()], notes


# Pascal VOC and CVAT -------------------------------------------------------------------------------------------------


def _listed(root: Path, split: str | None, val_fraction: float) -> Pairs:
    """The pairs that lists name; CVAT writes one list, ``default.txt``, of which a part is held out."""
    lists = root / "ImageSets" / "Segmentation"
    names = sorted(path.stem for path in lists.glob("*.txt"))
    train = next((name for name in names if part_of(name) == "train"), None)
    if not (root / "JPEGImages").is_dir():
        raise UserError(
            f"{root} has masks but no JPEGImages/",
            why="CVAT writes images only if asked to",
            hint="export again with images, or put them into JPEGImages/",
        )
    images, masks = _named(root / "JPEGImages"), _named(root / "SegmentationClass")
    home = root / "SegmentationClass"
    if train is None and split is None:
        everything = [name for own in names for name in _names_in(lists / f"{own}.txt")] or sorted(masks)
        return _held_out(_chosen(dict.fromkeys(everything), images, masks, home), val_fraction)
    held = split or next((name for part in ("val", "test") for name in names if part_of(name) == part), "val")
    parts = [_chosen(_names_in(lists / f"{part}.txt"), images, masks, home) for part in (train or "train", held)]
    return _joined([(pairs, []) for pairs, _ in parts], held)


def _names_in(file: Path) -> dict[str, None]:
    if not file.is_file():
        others = sorted(path.stem for path in file.parent.glob("*.txt") if part_of(path.stem) != "train")
        hint = "   or   ".join(f"--split {quoted(name)}" for name in others[:3]) or "a list of those to score"
        raise UserError(f"{file}: no such list", hint=hint)
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return dict.fromkeys(same_name(line) for line in lines if line)


def _chosen(
    names: dict[str, None], images: dict[str, Path], masks: dict[str, Path], home: Path
) -> tuple[list[Pair], list[str]]:
    lost = [name for name in names if name not in images]
    if lost or not names:
        raise UserError(
            f"a list names {len(lost)} images that are not in {home.parent / 'JPEGImages'}", why=f"first: {lost[:1]}"
        )
    own = {name: masks[name] for name in names if name in masks}
    return _paired({name: images[name] for name in names}, own, home)


# Cityscapes ----------------------------------------------------------------------------------------------------------


def _cityscapes(root: Path, split: str | None) -> Pairs:
    """``labelTrainIds`` where they were made, else the scored classes of ``labelIds``."""
    train, held = _parts(root / "leftImg8bit", subfolders(root / "leftImg8bit"), split)
    made = any(path.endswith("_labelTrainIds.png") for path in scan(root / "gtFine" / train).images)
    ending = "_labelTrainIds" if made else "_labelIds"
    parts = []
    for part in (train, held):
        home = root / "gtFine" / part
        parts.append(_paired(_named(root / "leftImg8bit" / part), _named(home, ending), home))
    names = dict(enumerate(CITYSCAPES.values())) if made else CITYSCAPES
    return _joined(parts, held)._replace(names=names, ignore=() if made else (*(set(range(34)) - set(names)), 255))


def _no_pairs(root: Path) -> UserError:
    found = ", ".join(f"{name}/" for name in subfolders(root)[:6]) or "no folders"
    return UserError(
        f"--data {root}: no images with masks",
        why=f"found {found}; readable are images/ beside masks/, with or without train/ and val/, and the folders of "
        "ADE20K, Pascal VOC, CVAT and Cityscapes",
        hint=f"{called('make_shapes')} --out data/shapes   shows the layout",
    )

"""A look at images before training on them: sizes, channels, statistics, and what cannot be read."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid
from tqdm import tqdm

from mim.data.images import Header, ImageError, read_header, read_image
from mim.data.sources import FileSource, FolderSource, ListSource, open_source
from mim.errors import UserError
from mim.program import called
from mim.randomness import keyed_generator

SHEET = 64
"""Pictures on the contact sheet, at most."""
THUMBNAIL = 96
"""Their side in pixels."""
SIDES = (32, 64, 128, 224, 384, 512, 1024, 2048, 4096)
"""Bounds of the size histogram, shorter side in pixels."""


class Look(NamedTuple):
    """What one image is like, or why it cannot be read."""

    position: int
    header: Header | None = None
    means: Sequence[float] = ()
    squares: Sequence[float] = ()
    thumbnail: Tensor | None = None
    error: ImageError | None = None


def scan(data: str, sample: int | None, channels: int, fix: Path | None, out: Path) -> None:
    """Reads images as training would and prints what they are like; ``mim.commands.check_data`` explains the arguments.

    Args:
        data: what ``--data`` names.
        sample: most images to read; all if not given.
        channels: of the images as training sees them.
        fix: list of the good files to write; reads every image.
        out: contact sheet to write.
    """
    train, held_out = open_source(data, channels, otherwise=f"{called('make_shapes')} --out shapes   draws some")
    if fix and not isinstance(train, FolderSource | ListSource):
        raise UserError(f"--fix {fix}: a list names files, not members of tar files", hint="leave --fix out")
    if fix and fix.suffix.lower() != ".csv":
        raise UserError(f"--fix {fix} is not a .csv file", hint=f"--fix {fix.with_suffix('.csv')}")
    limit = None if fix else sample
    looks = _look_at(train, limit)
    _print_part(data, train, looks)
    if held_out:
        _print_part(f"{data}, held out", held_out, _look_at(held_out, limit))
    thumbnails = [look.thumbnail for look in looks if look.thumbnail is not None]
    if thumbnails:
        out.parent.mkdir(parents=True, exist_ok=True)
        F.to_pil_image(make_grid(thumbnails[:SHEET], nrow=8, padding=4, pad_value=255)).save(out)
        print(f"  sheet    {out}")
    if fix:
        good = [look.position for look in looks if look.error is None]
        _write_list(fix, train, good)
        print(f"  list     {fix}: {len(good):,} good files, for  --data {fix}")


def _look_at(source: FileSource, limit: int | None) -> list[Look]:
    """Looks in index order; threads, because decoding releases the interpreter."""
    indices: Sequence[int] = range(len(source))
    if limit is not None and limit < len(source):
        chosen = torch.randperm(len(source), generator=keyed_generator("check_data"))[:limit]
        indices = sorted(chosen.tolist())
    drawn = set(indices[:: max(1, len(indices) // SHEET)])
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        looks = threads.map(lambda index: _look(source, index, index in drawn), indices)
        return list(tqdm(looks, total=len(indices), desc="reading", unit="image", disable=None, leave=False))


def _look(source: FileSource, index: int, draw: bool) -> Look:
    try:
        encoded = source.encoded(index)
        image = read_image(encoded, source.channels, source.describe(index))
        header = read_header(encoded, source.channels)
    except ImageError as error:
        return Look(index, error=error)
    # Every k-th pixel is enough for statistics, and floats of a large picture would not fit beside other threads'.
    step = max(1, min(image.shape[1:]) // 256)
    pixels = image[:, ::step, ::step].double().div(255).flatten(1)  # (C, pixels)
    means, squares = pixels.mean(1).tolist(), pixels.square().mean(1).tolist()
    return Look(index, header, means, squares, _thumbnail(image) if draw else None)


def _thumbnail(image: Tensor) -> Tensor:
    """``(3, THUMBNAIL, THUMBNAIL)`` uint8, the middle of the image; of more than three channels the first three."""
    middle = F.center_crop(image, [min(image.shape[1:])] * 2)
    shown = middle[:3] if len(middle) >= 3 else middle[:1].expand(3, -1, -1)
    thumbnail: Tensor = F.resize(shown, [THUMBNAIL, THUMBNAIL], antialias=True)
    return thumbnail


def _print_part(title: str, source: FileSource, looks: Sequence[Look]) -> None:
    headers = [look.header for look in looks if look.header]
    labels = f"{len(source.classes)} classes" if source.labels else "no labels"
    print(f"{title}: {len(source):,} images, {labels}, read {len(looks):,}")
    if headers:
        widths, heights = [h.width for h in headers], [h.height for h in headers]
        _print_row("formats", _counts(h.format for h in headers))
        _print_row("modes", f"{_counts(h.mode for h in headers)}, read as {source.channels} channels")
        _print_row("width", f"{min(widths)} to {max(widths)}, median {sorted(widths)[len(widths) // 2]}")
        _print_row("height", f"{min(heights)} to {max(heights)}, median {sorted(heights)[len(heights) // 2]}")
        _print_sides([min(h.width, h.height) for h in headers])
        mean = torch.tensor([look.means for look in looks if look.means]).mean(0)
        square = torch.tensor([look.squares for look in looks if look.squares]).mean(0)
        _print_row("mean", " ".join(f"{value:.3f}" for value in mean.tolist()))
        _print_row("std", " ".join(f"{value:.3f}" for value in (square - mean.square()).clamp_min(0).sqrt().tolist()))
    if source.ignored:
        _print_row("ignored", ", ".join(f"{kind} {count:,}" for kind, count in source.ignored.most_common()))
    bad = [*source.damaged, *(look.error for look in looks if look.error)]
    _print_row("bad", f"{len(bad):,}" + (f" ({len(bad) / max(1, len(looks)):.1%})" if bad else ""))
    for error in bad:
        print(f"    {error}")


def _print_sides(sides: Sequence[int]) -> None:
    """Histogram of shorter sides, a bar of at most 40 characters a line."""
    counts = Counter(sum(side >= bound for bound in SIDES) for side in sides)
    for place in range(min(counts), max(counts) + 1):
        low, high = (0, *SIDES)[place], (*SIDES, None)[place]
        span = f"{low} to {high - 1}" if high else f"{low} or more"
        bar = "#" * round(40 * counts[place] / max(counts.values()))
        print(f"  {'shorter' if place == min(counts) else '':8} {span:>12} {bar} {counts[place]:,}")


def _print_row(name: str, text: str) -> None:
    print(f"  {name:8} {text}")


def _counts(values: Iterable[str]) -> str:
    return ", ".join(f"{value} {count:,}" for value, count in Counter(values).most_common())


def _write_list(file: Path, source: FileSource, good: Sequence[int]) -> None:
    """``path,label`` of each good file, relative to the list's folder, so that both can move together."""
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = file.parent.resolve()
    with file.open("w", encoding="utf-8", errors="surrogateescape", newline="") as text:
        rows = csv.writer(text)
        rows.writerow(["path", "label"][: 2 if source.labels else 1])
        for index in good:
            path = os.path.relpath(Path(os.fsdecode(source.encoded(index))).absolute(), folder)
            rows.writerow([path, source.classes[source.labels[index]]] if source.labels else [path])

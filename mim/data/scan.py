"""A look at images before training on them: sizes, channels, values, statistics, and what cannot be read."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

from mim.data.bad_files import refuse_channels
from mim.data.files import UnmeasuredError
from mim.data.images import Header, ImageError
from mim.data.measuring import option, percentiles, short, statistics, value_range
from mim.data.pixels import AS_STORED, EIGHT_BIT, Pixels
from mim.data.sources import FileSource, FolderSource, ListSource, open_source
from mim.data.views import resized
from mim.data.windows import Windows, WindowSource, cut
from mim.errors import UserError
from mim.program import called, quoted
from mim.randomness import keyed_generator
from mim.terminal import progress

SHEET = 64
"""Pictures on the contact sheet, at most."""
THUMBNAIL = 96
"""Their side in pixels."""
SIDES = (32, 64, 128, 224, 384, 512, 1024, 2048, 4096)
"""Bounds of the size histogram, shorter side in pixels."""


BINS = 64
"""Bars of a histogram of values."""
FEW_LEVELS = 32
"""Different numbers in an image below which it is suspect of having lost its depth."""


class Look(NamedTuple):
    """What one image is like, or why it cannot be read.

    Attributes:
        position: its number.
        header: what the file says.
        kind: type of its numbers.
        values: ``(C, M)`` of its pixels, NaN where nothing was measured.
        levels: different numbers among them.
        thumbnail: ``(C, THUMBNAIL, THUMBNAIL)``, if it is to be shown.
        digest: of the file's bytes.
        error: why it cannot be read.
    """

    position: int
    header: Header | None = None
    kind: str = ""
    values: NDArray[np.float32] | None = None
    levels: int = 0
    thumbnail: Tensor | None = None
    digest: bytes = b""
    error: ImageError | None = None


def scan(
    data: str,
    sample: int | None,
    channels: int,
    fix: Path | None,
    out: Path,
    label_column: str | None = None,
    pixels: Pixels = AS_STORED,
    windows: Windows | None = None,
) -> None:
    """Reads images as training would and prints what they are like; ``mim.commands.check_data`` explains the arguments.

    Args:
        data: what ``--data`` names.
        sample: most images to read; all if not given.
        channels: of the images as training sees them.
        fix: list of the good files to write; reads every image.
        out: contact sheet to write.
        label_column: column of a table, or number of a folder's level, that holds the labels.
        pixels: bands and nodata.
        windows: how larger images are cut; read whole unless given.
    """
    otherwise = f"{called('make_shapes')} --out shapes   draws some"
    train, held_out = open_source(data, channels, otherwise=otherwise, label_column=label_column)
    if fix and not isinstance(train, FolderSource | ListSource):
        raise UserError(f"--fix {fix}: a list names files, not members of tar files", hint="leave --fix out")
    if fix and fix.suffix.lower() != ".csv":
        raise UserError(f"--fix {fix} is not a .csv file", hint=f"--fix {quoted(fix.with_suffix('.csv'))}")
    for source in filter(None, (train, held_out)):
        source.pixels = pixels
    if windows:
        train = cut(train, data, windows, pixels, "--channels")
        held_out = held_out and cut(held_out, data, windows, pixels, "--channels")
    limit = None if fix else sample
    looks = _look_at(train, limit)
    errors = [look.error for look in looks if look.error]
    refuse_channels(data, errors, channels, len(looks), option="--channels", bands=pixels.bands)
    scale = _print_part(data, train, looks)
    if held_out:
        _print_part(f"{data}, held out", held_out, _look_at(held_out, limit))
    shown = [_shown(look.thumbnail, scale) for look in looks if look.thumbnail is not None and look.kind == scale.type]
    if shown:
        out.parent.mkdir(parents=True, exist_ok=True)
        F.to_pil_image(make_grid(shown[:SHEET], nrow=8, padding=4, pad_value=255)).save(out)
        print(f"  sheet    {out}" + ("" if scale.type == "uint8" else "   (contrast of all stretched alike)"))
        histogram = out.with_name(f"{out.stem}_values.png")
        draw_histogram(_values_of(looks, scale.type), scale).save(histogram)
        print(f"  values   {histogram}: how often each value occurs, channel by channel")
    if fix:
        good = [look.position for look in looks if look.error is None or isinstance(look.error, UnmeasuredError)]
        if isinstance(train, WindowSource):
            good = train.whole_files(good)
            train = train.files
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
        return list(progress(looks, len(indices), "reading"))


def _look(source: FileSource, index: int, draw: bool) -> Look:
    try:
        image, header, kind, digest = source.examine(index)
    except ImageError as error:
        return Look(index, error=error)
    # Every k-th pixel is enough for statistics, and floats of a large picture would not fit beside other threads'.
    step = max(1, min(image.shape[1:]) // 128)
    values = image[:, ::step, ::step].flatten(1).float().numpy()  # (C, pixels)
    thumbnail = _thumbnail(image) if draw else None
    levels = len(np.unique(values[~np.isnan(values)]))
    return Look(index, header, kind, values, levels, thumbnail, digest)


def _thumbnail(image: Tensor) -> Tensor:
    """``(C, THUMBNAIL, THUMBNAIL)``, the middle of the image; of more than three channels the first three."""
    middle = F.center_crop(image, [min(image.shape[1:])] * 2)
    shown = middle[:3] if len(middle) >= 3 else middle[:1].expand(3, -1, -1)
    return resized(shown, [THUMBNAIL, THUMBNAIL], [0.0] * 3, v2.InterpolationMode.BILINEAR)


def _shown(thumbnail: Tensor, scale: Pixels) -> Tensor:
    """As ``(3, THUMBNAIL, THUMBNAIL)`` uint8."""
    if thumbnail.dtype == torch.uint8:
        return thumbnail
    share = (thumbnail.float() - scale.low[0]) / (scale.high[0] - scale.low[0])
    return share.nan_to_num(0).clamp(0, 1).mul(255).round().byte()


def _values_of(looks: Sequence[Look], kind: str) -> NDArray[np.float32]:
    """``(C, M)`` of all images of a type, equally many of each up to two million."""
    own = [look.values for look in looks if look.values is not None and look.kind == kind]
    most = max(64, 2_000_000 // max(1, len(own)))
    return np.concatenate([values[:, :: max(1, values.shape[1] // most)] for values in own], axis=1)


def _print_part(title: str, source: FileSource, looks: Sequence[Look]) -> Pixels:
    """Prints a table; returns the scale of the values."""
    headers = [look.header for look in looks if look.header]
    labels = f"{len(source.classes)} classes" if source.labels else "no labels"
    print(f"{title}: {len(source):,} {source.unit}, {labels}, read {len(looks):,}")
    for finding in source.findings():
        _print_row("layout", finding)
    scale = EIGHT_BIT
    if headers:
        widths, heights = [h.width for h in headers], [h.height for h in headers]
        _print_row("formats", _counts(h.format for h in headers))
        _print_row("modes", f"{_counts(h.mode for h in headers)}, read as {source.channels} channels")
        _print_row("width", f"{min(widths)} to {max(widths)}, median {sorted(widths)[len(widths) // 2]}")
        _print_row("height", f"{min(heights)} to {max(heights)}, median {sorted(heights)[len(heights) // 2]}")
        _print_sides([min(h.width, h.height) for h in headers])
        scale = _print_values(source, looks)
        _print_warnings(looks, scale.type)
    if source.ignored:
        _print_row("ignored", ", ".join(f"{kind} {count:,}" for kind, count in source.ignored.most_common()))
    if nodata := sum(isinstance(look.error, UnmeasuredError) for look in looks):
        _print_row("nodata", f"{nodata:,} of {len(looks):,} {source.unit} are nodata and are passed over in training")
    bad = [*source.damaged]
    bad += [look.error for look in looks if look.error and not isinstance(look.error, UnmeasuredError)]
    _print_row("bad", f"{len(bad):,}" + (f" ({len(bad) / max(1, len(looks)):.1%})" if bad else ""))
    for error in bad:
        print(f"    {error}")
    return scale


def _print_values(source: FileSource, looks: Sequence[Look]) -> Pixels:
    """Type, percentiles, levels, nodata, mean and deviation; then the options that say the same to a training."""
    kinds = Counter(look.kind for look in looks if look.kind)
    kind = kinds.most_common(1)[0][0]
    values = _values_of(looks, kind)
    missing = np.isnan(values[0])
    values = values[:, ~missing]
    ends = percentiles(values)
    levels = sorted(look.levels for look in looks if look.kind == kind)
    _print_row("types", _counts(look.kind for look in looks if look.kind))
    _print_row(
        "values",
        f"{short(ends[0])} to {short(ends[1])} (0.1 and 99.9 %), {short(float(values.min()))} to "
        f"{short(float(values.max()))} in all; median {levels[len(levels) // 2]:,} levels in an image",
    )
    if missing.any():
        _print_row("nodata", f"{missing.mean():.1%} of the pixels")
    colours = kind == "uint8" and source.channels == 3 and not source.pixels.bands
    low, high = (0.0, 255.0) if colours else value_range(values, ends, kind)
    pixels = Pixels((low,), (high,), kind, bands=source.pixels.bands, nodata=source.pixels.nodata)  # type: ignore[arg-type]
    mean, std = statistics(values, pixels)
    shown = mean, [0.0 if (channel == channel[0]).all() else value for channel, value in zip(values, std, strict=True)]
    for name, numbers in zip(("mean", "std"), shown, strict=True):
        _print_row(name, " ".join(f"{number:.3f}" for number in numbers))
    if not colours:
        lists = (f"--data.{name} [{','.join(f'{n:.6g}' for n in own)}]" for name, own in (("mean", mean), ("std", std)))
        scale = f"--value_range {option(pixels)} --in_chans {source.channels}"
        _print_row("options", " ".join([scale, *lists, *_reading(source)]))
    return pixels


def _reading(source: FileSource) -> list[str]:
    """The options that files were read with, as a training takes them."""
    pixels, windows = source.pixels, source.windows if isinstance(source, WindowSource) else None
    bands, nodata = ",".join(map(str, pixels.bands)), pixels.nodata
    given = {"bands": bands or None, "nodata": None if nodata is None else f"{nodata:g}"}
    if windows:
        apart = windows.stride if windows.stride != windows.side else None
        given |= {"windows": str(windows.side), "stride": None if apart is None else str(apart)}
    return [f"--{name} {value}" for name, value in given.items() if value is not None]


def _print_warnings(looks: Sequence[Look], kind: str) -> None:
    """What makes a training worse than the images deserve."""
    own = [look for look in looks if look.kind]
    count = len(own)
    if others := sum(look.kind != kind for look in own):
        _print_row("warning", f"{others:,} of {count:,} files hold another type than {kind}")
    tops = np.array(
        [np.nanpercentile(look.values, 99) for look in own if look.kind == kind and look.values is not None]
    )
    if len(tops) > 3 and kind != "uint8" and np.percentile(tops, 95) > 20 * max(np.percentile(tops, 5), 1e-12) > 0:
        lower, upper = np.percentile(tops, [5, 95])
        _print_row(
            "warning", f"scales differ: bright pixels are {short(lower)} in some files, {short(upper)} in others"
        )
    flat = sum(look.values is not None and _is_flat(look.values) for look in own)
    if flat:
        _print_row("warning", f"{flat:,} of {count:,} images are nearly one colour")
    coarse = sum(look.kind == kind != "uint8" and 2 < look.levels < FEW_LEVELS for look in own)
    if coarse:
        _print_row("warning", f"{coarse:,} of {count:,} images hold fewer than {FEW_LEVELS} different values")
    pages = Counter(look.header.pages for look in own if look.header and look.header.pages > 1)
    for number, files in pages.most_common(3):
        _print_row("warning", f"{files:,} files have {number} pages, the first is read")
    copies = sum(times - 1 for times in Counter(look.digest for look in own).values())
    if copies:
        _print_row("warning", f"{copies:,} of {count:,} files are copies of others")


def _is_flat(values: NDArray[np.float32]) -> bool:
    """Whether the middle 98 % of all channels lie within a thousandth of their size."""
    low, high = np.nanpercentile(values, [1, 99], axis=1)
    return bool((high - low <= 1e-3 * np.maximum(np.abs(high), np.abs(low))).all())


def draw_histogram(values: NDArray[np.float32], scale: Pixels) -> Image.Image:
    """How often values occur: a row for each of up to 16 channels, square roots of counts over the range of all.

    Args:
        values: ``(C, M)`` numbers.
        scale: what becomes 0 and 1, two lines in the picture.
    """
    width, height, rows = 8 * BINS, 60, values[:16]
    known = rows[np.isfinite(rows)]
    low, high = min(float(known.min()), scale.low[0]), max(float(known.max()), scale.high[0])
    high = high if high > low else low + 1
    picture = Image.new("RGB", (width, height * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for row, channel in enumerate(rows):
        counts, _ = np.histogram(channel[np.isfinite(channel)], BINS, (low, high))
        bottom = height * (row + 1) - 1
        for place, share in enumerate(np.sqrt(counts / max(1, counts.max()))):
            draw.rectangle((8 * place, bottom - share * (height - 16), 8 * place + 6, bottom), (90, 110, 160))
        for end in (scale.low[0], scale.high[0]):
            x = (end - low) / (high - low) * (width - 1)
            draw.line((x, bottom - height + 16, x, bottom), (200, 60, 40))
        draw.text((2, bottom - height + 2), f"channel {row + 1}: {short(low)} to {short(high)}", (60, 60, 60))
    return picture


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

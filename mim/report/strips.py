"""The pictures of the report: what the model sees now, how that came about, what later evaluations drew."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mim.pictures.strips import read_strip
from mim.report.markup import Html, count, picture, section, tag, zoomable
from mim.report.record import Run

TILE = 160  # longest side of an inlined tile in pixels
EPOCHS_SHOWN, ROWS_OVER_TIME = 5, 3


def what_it_sees(run: Run, limit: int) -> Html:
    """The newest strip in full, and how the first of its images changed from epoch to epoch."""
    strips = read_strips(run)
    if not strips:
        return Html("")
    epochs, newest = sorted(strips), strips[max(strips)]
    rows = range(len(newest["input"]))
    half = math.ceil(len(rows) / 2)
    blocks = [mosaic(newest, part, limit) for part in (rows[:half], rows[half:]) if part]
    shown = [epochs[i] for i in np.unique(np.linspace(0, len(epochs) - 1, EPOCHS_SHOWN).round().astype(int))]
    changing = [title for title in newest if changes([strips[epoch].get(title, []) for epoch in shown])]
    timelines = [
        tag(
            "figure",
            tag("figcaption", title),
            mosaic(
                {"input": newest["input"]} | {f"epoch {epoch:g}": strips[epoch][title] for epoch in shown},
                rows[:ROWS_OVER_TIME],
                limit,
            ),
        )
        for title in changing
    ]
    later = [tag("h3", "The same images over time"), tag("div", *timelines, class_="pair")] if timelines else []
    explained = [SEEN[title] for title in newest if title in SEEN]
    lead = " ".join([f"After epoch {max(epochs):g}." if max(epochs) else "Before training.", *explained])
    return section("What it sees", tag("div", *blocks, class_="pair"), *later, lead=lead)


SEEN = {
    "hidden": "Hidden: what the encoder does not see is magenta.",
    "edges": "Edges: the directions in each quarter of a patch, as strokes.",
    "imagined edges": "Imagined edges: the same, in hidden patches as the model believes them to be.",
    "difficulty": "Difficulty: how hard the model expects each patch to be if it is hidden, bright is much.",
    "error": "Error: how far the reconstruction of each patch is off while it is hidden, bright is much.",
    "attention": "Attention: where the class token looks in the last block, bright is much.",
    "similarity": "Similarity: how much each patch is like the one in the centre, bright is much.",
    "clusters": "Clusters: patches of one colour are nearest to the same prototype.",
    "features": "Features: the three main directions of the patch features as red, green and blue; "
    "patches of one colour are alike to the model.",
}


def read_strips(run: Run) -> dict[float, dict[str, list[Image.Image]]]:
    """Epoch -> title -> tiles, of all strips that are whole and show as many images as the newest."""
    strips = {}
    for path in run.folder.glob("images/epoch_*.png"):
        epoch = re.fullmatch(r"epoch_(\d+(?:\.\d+)?)", path.stem)
        try:
            tiles = read_strip(path)
        except (OSError, SyntaxError, ValueError, KeyError) as error:
            run.unreadable.append(f"{path.name}: {error}")
            continue
        if epoch and "input" in tiles:
            strips[float(epoch[1])] = tiles
    return {epoch: tiles for epoch, tiles in strips.items() if len(tiles["input"]) == len(strips[max(strips)]["input"])}


def changes(columns: list[list[Image.Image]]) -> bool:
    """Whether tiles of the same images differ between epochs; a column that some epoch lacks does not count."""
    if len({len(tiles) for tiles in columns}) > 1:
        return False
    return len({b"".join(tile.tobytes() for tile in tiles) for tiles in columns}) > 1


def mosaic(columns: dict[str, list[Image.Image]], rows: Sequence[int], limit: int) -> Html:
    """Tiles as one picture below their titles: a row per image, a column per entry."""
    width, height = next(iter(columns.values()))[0].size
    scale = min(1.0, TILE / max(width, height))
    width, height, gap = round(width * scale), round(height * scale), round(TILE / 32)
    canvas = Image.new("RGBA", (len(columns) * (width + gap) - gap, len(rows) * (height + gap) - gap))
    for column, tiles in enumerate(columns.values()):
        for line, row in enumerate(rows):
            tile = tiles[row].resize((width, height), Image.Resampling.LANCZOS)
            canvas.paste(tile, (column * (width + gap), line * (height + gap)))
    titles = tag("div", *(tag("span", title) for title in columns), class_="titles")
    shown = picture(canvas, f"{', '.join(columns)} of {count(len(rows), 'image')}", limit)
    return tag("div", titles, zoomable(shown), class_="mosaic")


def augmentation(run: Run, limit: int) -> Html:
    """Some images, and the views of them that were trained on."""
    path = run.folder / "images" / "augmentation.png"
    try:
        tiles = read_strip(path) if path.is_file() else {}
    except (OSError, SyntaxError, ValueError, KeyError) as error:
        run.unreadable.append(f"{path.name}: {error}")
        tiles = {}
    if not tiles:
        return Html("")
    shown = mosaic(tiles, range(len(next(iter(tiles.values())))), limit)
    return tag(
        "figure", tag("figcaption", "What is made of an image before the encoder sees it"), shown, class_="narrow"
    )


def overlay(path: Path, run: Run, limit: int) -> Html:
    """A picture of an evaluation, at most as wide as the page."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.thumbnail((1100, 1100))
            return tag("figure", picture(image.convert("RGBA"), path.stem, limit), tag("figcaption", path.stem))
    except (OSError, SyntaxError, ValueError) as error:
        run.unreadable.append(f"{path.name}: {error}")
        return Html("")

"""Drawn images with class labels and masks: they serve every task, come from a seed, and are stored nowhere."""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mim.randomness import derive_seed

Array = npt.NDArray[np.float32]


class ShapeSource:
    """One of ten shapes, filled or outlined, on a textured and cluttered background.

    Place, scale, turn, colours and textures are a function of (seed, split, index) and independent of the class, so
    colour says nothing about the label. Classes are balanced.

    Args:
        split: ``train`` or ``val``; they share no image.
        count: number of images; by default 1,024 for training and 256 for validation.
        size: side of an image in pixels.
        seed: another seed gives another set.
    """

    name = "shapes"

    def __init__(self, split: Literal["train", "val"], count: int | None = None, size: int = 64, seed: int = 0) -> None:
        self.split, self.size, self.seed = split, size, seed
        self.count = {"train": 1024, "val": 256}[split] if count is None else count
        self.classes: list[str] = list(_OUTLINES)
        self.mask_classes: list[str] = ["background", *self.classes]
        self.labels: list[int] | None = [index % len(self.classes) for index in range(self.count)]

    def __len__(self) -> int:
        """Number of images."""
        return self.count

    def describe(self, index: int) -> str:
        """Which drawing image ``index`` is, for messages."""
        return f"shapes:{self.split}/{index} ({self.classes[index % len(self.classes)]})"

    def read(self, index: int) -> Tensor:
        """``(3, size, size)`` uint8."""
        return self.read_pair(index)[0]

    def read_mask(self, index: int) -> Tensor:
        """The mask of :meth:`read_pair` alone."""
        return self.read_pair(index)[1]

    def read_pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Image ``(3, size, size)`` uint8 and its mask ``(size, size)`` uint8.

        The mask holds 0 on the background and label + 1 on the shape; an outlined shape owns its inside.
        """
        rng = np.random.default_rng(derive_seed(self.name, self.seed, self.split, index))
        label = index % len(self.classes)
        paint, silhouette = _draw_shape(rng, _OUTLINES[self.classes[label]], self.size)

        colour = rng.random(3, dtype=np.float32)
        # Each channel differs by 0.3 to 0.7 from the background's, whatever that is.
        contrast = (colour + rng.uniform(0.3, 0.7, 3).astype(np.float32)) % 1
        background = _clutter(rng, _texture(rng, colour, self.size))
        image = background + paint[..., None] * (_texture(rng, contrast, self.size) - background)
        pixels = torch.from_numpy(image).clamp(0, 1).mul(255).round().to(torch.uint8)
        mask = torch.from_numpy(silhouette >= 0.5).to(torch.uint8) * (label + 1)
        return pixels.permute(2, 0, 1).contiguous(), mask


def _draw_shape(rng: np.random.Generator, outline: Array, size: int) -> tuple[Array, Array]:
    """Coverage by paint and by the whole silhouette, each ``(size, size)`` in [0, 1], of an outline thrown anywhere."""
    radius, turn = rng.uniform(0.32, 0.44), rng.uniform(-0.25, 0.25)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    centre = rng.uniform(radius, 1 - radius, 2)
    fine = 4 * size  # fourfold supersampling: PIL's polygons are not antialiased
    points = [(x, y) for x, y in ((outline @ rotation * radius + centre) * fine).tolist()]

    canvas = Image.new("L", (fine, fine))
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    silhouette = _shrink(canvas, size)
    if rng.random() < 0.5:
        return silhouette, silhouette
    canvas = Image.new("L", (fine, fine))
    width = round(rng.uniform(0.07, 0.12) * fine)
    ImageDraw.Draw(canvas).line([*points, *points[:2]], fill=255, width=width, joint="curve")
    stroke = _shrink(canvas, size)
    return stroke, np.maximum(stroke, silhouette)


def _shrink(coverage: Image.Image, size: int) -> Array:
    small = coverage.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small).astype(np.float32) / np.float32(255)


def _texture(rng: np.random.Generator, colour: Array, size: int) -> Array:
    """``(size, size, 3)`` around ``colour``: a grating, slow shading and fine noise."""
    turn, frequency, phase = rng.uniform((0, 3, 0), (np.pi, 12, 2 * np.pi)).tolist()
    across = np.arange(size, dtype=np.float32) * (2 * np.pi * frequency / size)
    grating = np.sin(across * math.cos(turn) + across[:, None] * math.sin(turn) + phase)
    coarse = Image.fromarray(rng.normal(0, 0.1, (4, 4)).astype(np.float32))
    shading = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    noise = np.float32(0.03) * rng.standard_normal((size, size), dtype=np.float32)
    light: Array = rng.uniform(0, 0.1) * grating + shading + noise
    return colour + light[..., None]


def _clutter(rng: np.random.Generator, texture: Array) -> Array:
    """The texture with a few strokes and dots in random colours, too small to be taken for a shape."""
    size = len(texture)
    canvas = Image.fromarray((texture.clip(0, 1) * 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(2, 7)):
        (x, y), (dx, dy) = rng.uniform(0, size, 2), rng.normal(0, 0.15 * size, 2)
        colour = tuple(rng.integers(0, 256, 3).tolist())
        if rng.random() < 0.5:
            draw.line((x, y, x + dx, y + dy), colour, width=max(1, size // 32))
        else:
            radius = rng.uniform(0.01, 0.04) * size
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    return np.asarray(canvas).astype(np.float32) / np.float32(255)


def _outlines() -> dict[str, Array]:
    """Closed outlines ``(K, 2)`` as (x, y) with y down, inside the unit circle, in the order of the labels."""
    turn, half = np.linspace(0, 2 * np.pi, 60, endpoint=False), np.linspace(0, np.pi, 30)
    sine, cosine = np.sin(half), np.cos(half)
    heart = 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn) - 13 * np.cos(turn)
    arrow = [(0, -1), (0.7, -0.2), (0.28, -0.2), (0.28, 0.95), (-0.28, 0.95), (-0.28, -0.2), (-0.7, -0.2)]
    a, b = 0.3, 0.95
    cross = [(a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a), (-a, -b)]
    outlines = {
        "arrow": arrow,
        "circle": _regular(60, 0.9),
        "crescent": 0.9 * np.concatenate([np.stack([0.4 - sine, cosine], 1), np.stack([0.4 - 0.4 * sine, -cosine], 1)]),
        "cross": cross,
        "drop": np.stack([0.9 * np.sin(turn) * np.sin(turn / 2), -np.cos(turn)], 1),
        "heart": np.stack([16 * np.sin(turn) ** 3, heart], 1) / 17,
        "hexagon": _regular(6, 1.0),
        "square": _regular(4, 1.0),
        "star": _regular(10, np.tile([1.0, 0.42], 5)),
        "triangle": _regular(3, 1.0),
    }
    return {name: np.asarray(points, dtype=np.float32) for name, points in outlines.items()}


def _regular(corners: int, radii: float | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``(corners, 2)`` points at equal angles, the first one on top."""
    angles = 2 * np.pi * np.arange(corners) / corners
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], 1)


_OUTLINES = _outlines()

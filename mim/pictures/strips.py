"""What a model sees, as one picture: a row per image, a column per view of it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from mim.atomic import replaced
from mim.encoder import Encoder
from mim.masking import Masking
from mim.randomness import RowGenerator

GAP, HEADER = 6, 24  # pixels between tiles, and above them for the titles
SHORTEST, LONGEST = 96, 224  # the shorter side of a tile lies in between
HIDDEN = (190, 24, 140)  # of hidden patches: no photo has it, and it is told from grey by lightness, too
INK = (122, 122, 122)  # legible on white (4.3 : 1) and on black (4.9 : 1); the background is transparent


def strip(
    images: Tensor,
    pictures: dict[str, Tensor],
    encoder: Encoder,
    mean: Sequence[float],
    std: Sequence[float],
    measured: bool = False,
) -> Image.Image:
    """Input, the method's own pictures, attention and features of every image, side by side under their titles.

    Args:
        images: ``(B, C, H, W)``, normalised.
        pictures: what the method shows by name: ``(B, C, H, W)`` in the same normalised space, ``(B, h, w)`` floats of
            any scale, drawn as heat, or ``(B, h, w)`` whole numbers, each drawn in a colour of its own.
        encoder: whose attention and features are drawn; returned in the mode it came in.
        mean: per channel, as used to normalise.
        std: per channel, as used to normalise.
        measured: images are measurements rather than pictures: their contrast is stretched, and the title says so.

    Returns:
        An RGBA picture on a transparent ground. ``save_strip`` keeps its layout, so that ``read_strip`` can cut it.
    """
    mean, std, note = stretched(images, mean, std) if measured else (mean, std, "")
    columns = {name: draw(views, mean, std) for name, views in {"input": images, **pictures}.items()}
    if "hidden" in pictures and pictures["hidden"].shape == images.shape:
        changed = (pictures["hidden"] != images).any(dim=1).float()
        columns["hidden"] = mark_hidden(columns["hidden"], F.max_pool2d(changed, encoder.patch_size) > 0)
    training = encoder.training
    encoder.eval()
    columns |= encoder_views(images, encoder)
    encoder.train(training)
    return lay_out(columns, {"input": note})


def columns_of(
    pictures: dict[str, Tensor], mean: Sequence[float], std: Sequence[float], measured: bool = False
) -> Image.Image:
    """Normalised ``(B, C, H, W)`` by title, side by side; the contrast of measurements is that of the first entry."""
    first = next(iter(pictures))
    mean, std, note = stretched(pictures[first], mean, std) if measured else (mean, std, "")
    return lay_out({title: to_rgb(images, mean, std) for title, images in pictures.items()}, {first: note})


def columns_of_maps(
    images: Tensor, maps: dict[str, Tensor], mean: Sequence[float], std: Sequence[float], measured: bool = False
) -> Image.Image:
    """Normalised images ``(B, C, H, W)`` and beside them maps ``(B, h, w)`` over their patches by title, as heat."""
    mean, std, note = stretched(images, mean, std) if measured else (mean, std, "")
    columns = {"input": to_rgb(images, mean, std), **{title: heat(values.float()) for title, values in maps.items()}}
    return lay_out(columns, {"input": note})


def masking_strip(
    images: Tensor,
    encoder: Encoder,
    policies: dict[str, Masking],
    mean: Sequence[float],
    std: Sequence[float],
    measured: bool = False,
) -> Image.Image:
    """What policies hide of the same images, side by side, and the attention that guided ones follow.

    Args:
        images: ``(B, C, H, W)``, normalised.
        encoder: whose class attention guides, such as a trained teacher.
        policies: by title; without a class token only those that nothing guides.
        mean: per channel, as used to normalise.
        std: per channel, as used to normalise.
        measured: as for :func:`strip`.

    Returns:
        As :func:`strip`.
    """
    mean, std, note = stretched(images, mean, std) if measured else (mean, std, "")
    columns, attention = {"input": to_rgb(images, mean, std)}, None
    if encoder.has_class_attention:
        with torch.no_grad():
            attention = encoder.forward_with_attention(images)[1].float()  # (B, N)
        columns["attention"] = heat(attention.view(-1, *encoder.grid))
    for title, policy in policies.items():
        generator = RowGenerator.for_rows(0, 0, len(images), images.device)
        mask = policy(len(images), encoder.grid, scores=attention, generator=generator)  # (B, N)
        columns[title] = mark_hidden(columns["input"], mask.view(-1, *encoder.grid))
    return lay_out(columns, {"input": note})


def mark_hidden(shown: Tensor, hidden: Tensor) -> Tensor:
    """``shown (B, 3, H, W)`` uint8 with patches of one colour where ``hidden (B, h, w)`` bool is true."""
    places = F.interpolate(hidden[:, None].float(), shown.shape[2:], mode="nearest").bool().to(shown.device)
    return torch.where(places, torch.tensor(HIDDEN, dtype=torch.uint8, device=shown.device)[:, None, None], shown)


def draw(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures, values or labels, as :func:`strip` takes them, to ``(B, 3, h, w)`` uint8."""
    if views.ndim == 4:
        return to_rgb(views, mean, std)
    return heat(views.float()) if views.is_floating_point() else label_colours(views)


def label_colours(labels: Tensor) -> Tensor:
    """``(B, h, w)`` whole numbers to colours ``(B, 3, h, w)`` uint8; a number has the same colour in every picture."""
    turns = labels.cpu().double() * 0.6180339887498949  # of the golden ratio: neighbouring numbers look different
    hue, shade = turns % 1, 0.6 + 0.4 * ((turns * 7.3) % 1)
    colours = colormaps["hsv"](hue.numpy())[..., :3] * shade[..., None].numpy()  # (B, h, w, 3)
    return _bytes(torch.from_numpy(colours).permute(0, 3, 1, 2))


def to_rgb(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised ``(B, C, H, W)`` to ``(B, 3, H, W)`` uint8: the first three channels, or the first one as grey."""
    statistics = images.new_tensor([list(mean), list(std)]).view(2, 1, -1, 1, 1)
    pixels = images * statistics[1] + statistics[0]
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return _bytes(pixels)


def stretched(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float], str]:
    """Mean and deviation with which :func:`to_rgb` shows percentiles 1 to 99 of each channel as black to white.

    Args:
        images: ``(B, C, H, W)``, normalised; those that the contrast is made for.
        mean: per channel, as used to normalise.
        std: per channel, as used to normalise.

    Returns:
        Mean, deviation, and a few words for the title.
    """
    numbers = images.detach().float().cpu().transpose(0, 1).flatten(1)
    numbers = numbers[:, :: max(1, numbers.shape[1] >> 20)]  # (C, M); torch's quantile takes 16 million at most
    low, high = numbers.quantile(0.01, dim=1), numbers.quantile(0.99, dim=1)
    span = (high - low).clamp(min=1e-6)
    channels = len(mean)
    note = (
        f"false colours of {channels}" if channels > 3 else f"channel 1 of {channels}" if channels == 2 else "stretched"
    )
    return (-low / span).tolist(), (1 / span).tolist(), note


@torch.no_grad()
def encoder_views(images: Tensor, encoder: Encoder) -> dict[str, Tensor]:
    """Attention of the class token and the main directions of the patch features, ``(B, 3, h, w)`` uint8 each.

    A model without class token has no such attention; "similarity" then shows the cosine to the centre patch.
    """
    features = encoder.feature_map(images).float()  # (B, D, h, w)
    height, width = features.shape[-2:]
    if encoder.has_class_attention:
        attention = encoder.forward_with_attention(images)[1].float()  # (B, N)
        return {"attention": heat(attention.view(-1, height, width)), "features": pca_rgb(features)}
    centre = features[:, :, height // 2, width // 2, None, None]
    return {"similarity": heat(F.cosine_similarity(features, centre)), "features": pca_rgb(features)}


def heat(values: Tensor) -> Tensor:
    """``(B, h, w)`` of any scale to colours ``(B, 3, h, w)`` uint8: dark is the least of each image, bright the most.

    The top two per cent share one colour, since single outlying patches are common and would hide all others.
    """
    flat = values.flatten(1)
    low, high = flat.amin(1), flat.quantile(0.98, dim=1)
    share = (values - low[:, None, None]) / (high - low).clamp(min=1e-12)[:, None, None]
    colours = colormaps["inferno"](share.clamp(0, 1).cpu().numpy())[..., :3]  # (B, h, w, 3)
    return _bytes(torch.from_numpy(colours).permute(0, 3, 1, 2))


def pca_rgb(features: Tensor) -> Tensor:
    """First three principal components of ``(B, D, h, w)`` as red, green and blue, ``(B, 3, h, w)`` uint8.

    Components are those of the whole batch, so that equal colours mean similar patches in all of its images.
    """
    batch, dim, height, width = features.shape
    points = features.cpu().nan_to_num().permute(0, 2, 3, 1).reshape(-1, dim)  # (B * N, D); a diverged model has NaN
    points = points - points.mean(0)
    axes = torch.linalg.eigh(points.T @ points).eigenvectors[:, -3:].flip(1)  # (D, 3), the strongest first
    # An eigenvector's sign is arbitrary; fixed, the same features get the same colours on every machine.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    colours = points @ axes
    low, high = colours.quantile(0.01, dim=0), colours.quantile(0.99, dim=0)
    colours = (colours - low) / (high - low).clamp(min=1e-12)
    return _bytes(colours.view(batch, height, width, 3).permute(0, 3, 1, 2))


def save_strip(picture: Image.Image, path: Path) -> None:
    """Writes a picture made by ``strip`` as PNG, whole or not at all, with what ``read_strip`` needs."""
    layout = PngInfo()
    layout.add_text("layout", picture.info["layout"])
    with replaced(path) as aside:
        picture.save(aside, format="PNG", pnginfo=layout)


def read_strip(path: Path) -> dict[str, list[Image.Image]]:
    """The tiles of a saved strip, title -> one RGB tile per image; empty for any other PNG."""
    with Image.open(path, formats=["PNG"]) as picture:
        if not isinstance(picture, PngImageFile) or "layout" not in picture.text:
            return {}
        layout = json.loads(picture.text["layout"])
        size, rows = layout["tile"], range(layout["rows"])
        pixels = picture.convert("RGB")
    corners = {title: [_corner(row, column, size) for row in rows] for column, title in enumerate(layout["titles"])}
    return {title: [pixels.crop((x, y, x + size[0], y + size[1])) for x, y in at] for title, at in corners.items()}


def lay_out(columns: dict[str, Tensor], notes: Mapping[str, str] = MappingProxyType({})) -> Image.Image:
    """Pictures ``(B, 3, h, w)`` uint8 by title, side by side; the first column sets the size of the tiles.

    Args:
        columns: the pictures.
        notes: what is written behind some of the titles.
    """
    rows, _, height, width = next(iter(columns.values())).shape
    size = tile_size(width, height)
    right, bottom = _corner(rows, len(columns), size)
    canvas = Image.new("RGBA", (right, bottom), (*INK, 0))
    draw = ImageDraw.Draw(canvas)
    for column, (title, views) in enumerate(columns.items()):
        text = f"{title}, {notes[title]}" if notes.get(title) else title
        draw.text((_corner(0, column, size)[0] + size[0] / 2, HEADER / 2), text, INK, _font(text, size[0]), "mm")
        for row, view in enumerate(views.permute(0, 2, 3, 1).cpu().numpy()):
            canvas.paste(_resize(view, size), _corner(row, column, size))
    canvas.info["layout"] = json.dumps({"titles": list(columns), "rows": rows, "tile": size})
    return canvas


def _corner(row: int, column: int, size: Sequence[int]) -> tuple[int, int]:
    """Upper left pixel of a tile."""
    return GAP + column * (size[0] + GAP), HEADER + row * (size[1] + GAP)


def tile_size(width: int, height: int) -> tuple[int, int]:
    """Small images grow by a whole factor, which keeps their pixels square and sharp."""
    grow, shrink = math.ceil(SHORTEST / min(width, height)), min(1.0, LONGEST / min(width, height))
    scale = grow if grow > 1 else shrink
    return round(width * scale), round(height * scale)


def _resize(view: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """``(h, w, 3)`` uint8; a pixel or patch that grows keeps its edges, and nothing is invented between them."""
    grows = size[0] >= view.shape[1]
    return Image.fromarray(view).resize(size, Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def _font(title: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, 14 px or as small as the column demands."""
    wanted = ImageFont.load_default(14).getbbox(title)[2]
    return ImageFont.load_default(14 * min(1, width / max(wanted, 1)))


def _bytes(values: Tensor) -> Tensor:
    """[0, 1] to uint8; what is not a number becomes black."""
    return values.nan_to_num(0).clamp(0, 1).mul(255).round().byte()

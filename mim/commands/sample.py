"""Draw images: ``python tools/sample.py --run runs/001-maskgit-photos``."""

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mim.errors import UserError
from mim.options.outputs import check_picture
from mim.options.ranges import Count, NotNegative, Seed, Whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from mim.data.pretrain import PretrainData
    from mim.encoder import Encoder


def run(
    run: Path,
    hide: Literal["all", "middle", "border", "right"] = "all",
    count: Count = 36,
    data: str | None = None,
    classes: list[Whole] | None = None,
    steps: Count = 12,
    temperature: NotNegative = 4.5,
    schedule: Literal["cosine", "linear", "square"] = "cosine",
    seed: Seed = 0,
    out: Path = Path("sample.png"),
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Draw images with a run of a method that can, in a few steps, or hide a part of given images and draw that.

    Args:
        run: folder of the run.
        hide: all draws out of nothing; middle, border and right show images, what was hidden of them, and two drawings.
        count: number of images; rows of the picture unless all is drawn.
        data: images of which a part is hidden; those of the run unless given.
        classes: labels to draw, in turn, for a run that was trained with classes; of all kinds unless given.
        steps: how often the network is asked for an image.
        temperature: of the noise on what the network is sure of; 0 takes the surest first, and images look alike.
        schedule: how much is left to draw after a step; cosine begins with few.
        seed: image i is a function of seed and i.
        out: the picture, a PNG.
        device: where to compute; auto takes a GPU if there is one.
    """
    check_picture("--out", out)
    if hide != "all" and classes:
        raise UserError("--classes is for images out of nothing", hint="--hide all   or leave --classes out")
    from mim.layers.decoding import Decoding, DrawsImages
    from mim.run.weights import load_method
    from mim.transfer.features import chosen_device

    method, opened, _ = load_method(run)
    if not isinstance(method, DrawsImages):
        raise UserError(
            f"{method.name} draws no images",
            why="it predicts no ids",
            hint="a run of a method that predicts ids of a tokenizer: docs/tokens.md",
        )
    encoder = method.to(chosen_device(device)).evaluated
    opened.path = data or opened.path
    opened.open(encoder.img_size, encoder.in_chans, seed)
    draw = partial(method.draw_images, decoding=Decoding(steps, temperature, schedule))
    if hide == "all":
        _save_grid(draw(*_nothing(encoder, count), seed, classes=classes or ()), opened, out)
    else:
        _save_rows(draw, encoder, opened, hide, count, seed, out)
    print(f"  picture {out}")


def _nothing(encoder: "Encoder", count: int) -> "tuple[Tensor, Tensor]":
    """Images ``(count, C, H, W)``, and ``(count, N)`` that all of them is hidden."""
    import torch

    device = next(encoder.parameters()).device
    hidden = torch.ones(count, math.prod(encoder.grid), dtype=torch.bool, device=device)
    return torch.zeros(count, encoder.in_chans, *encoder.img_size, device=device), hidden


def _save_grid(images: "Tensor", data: "PretrainData", out: Path) -> None:
    """Images side by side, as nearly a square as can be."""
    from PIL import Image
    from torchvision.utils import make_grid

    from mim.pictures.strips import to_rgb

    shown = to_rgb(images, data.mean, data.std)
    grid = make_grid(shown, nrow=math.ceil(len(shown) ** 0.5), padding=2, pad_value=255)
    grow = max(1, 96 // images.shape[-1])
    grid = grid.repeat_interleave(grow, 1).repeat_interleave(grow, 2)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid.permute(1, 2, 0).cpu().numpy()).save(out)


def _save_rows(
    draw: "Callable[[Tensor, Tensor, int], Tensor]",
    encoder: "Encoder",
    data: "PretrainData",
    hide: str,
    count: int,
    seed: int,
    out: Path,
) -> None:
    """A row per image: it, what is left of it, and two drawings of the rest."""
    import torch
    import torch.nn.functional as F

    from mim.pictures import strips

    source = data.evaluation or data.source
    chosen = [place * len(source) // count for place in range(min(count, len(source)))]
    batches = [pixels for pixels, _ in data.center_batches(source, chosen)]
    if not batches:
        raise UserError(f"--data {data.path}: none of the {len(chosen)} images that were tried can be read")
    device = next(encoder.parameters()).device
    images, hidden = torch.cat(batches).to(device), hidden_part(hide, encoder.grid).to(device)
    area = F.interpolate(hidden[None, None].float(), images.shape[2:], mode="nearest")
    columns = {"input": images, "hidden": images * (1 - area)}
    for name, number in (("drawn", seed), ("another", seed + 1)):
        columns[name] = draw(images, hidden.flatten().expand(len(images), -1), number)
    out.parent.mkdir(parents=True, exist_ok=True)
    shown = {name: strips.draw(views, data.mean, data.std) for name, views in columns.items()}
    strips.save_strip(strips.lay_out(shown), out)


def hidden_part(hide: str, grid: tuple[int, int]) -> "Tensor":
    """``(h, w)`` bool, True = hidden: the middle quarter of an image, all but it, or the right half."""
    import torch

    height, width = grid
    hidden = torch.zeros(grid, dtype=torch.bool)
    if hide == "right":
        hidden[:, width // 2 :] = True
        return hidden
    top, left = height // 4, width // 4
    hidden[top : height - top, left : width - left] = True
    return hidden if hide == "middle" else ~hidden

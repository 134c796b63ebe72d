"""Which tokens live, merge or leave: the same images before and after a reduction, block by block."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mim.encoder import Encoder
from mim.patches import patchify, unpatchify
from mim.pictures.strips import lay_out, stretched, tile_size, to_rgb
from mim.reduction import Tokens

PAPER, FADED = 255, 0.85  # what patches without a token fade to, and how far
EDGE = (255, 214, 0)  # around merged patches: seldom a colour of photos


def reduction_strip(
    images: Tensor,
    states: dict[str, Tokens],
    patch_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    measured: bool = False,
) -> Image.Image:
    """Images beside what is left of them: a row per image, a column per state.

    A patch that is a token of its own is shown as it is. Patches that share a token have their mean colour and one
    outline around them. Patches without a token are white but for a trace.

    Args:
        images: ``(B, C, H, W)``, normalised.
        states: tokens of these images by title.
        patch_size: height and width of a patch in pixels.
        mean: per channel, as used to normalise.
        std: per channel, as used to normalise.
        measured: images are measurements, whose contrast is stretched.

    Returns:
        A picture that ``mim.pictures.strips.save_strip`` writes.
    """
    mean, std, note = stretched(images, mean, std) if measured else (mean, std, "")
    shown = to_rgb(images, mean, std)
    columns = {"input": shown}
    for title, tokens in states.items():
        columns[title] = draw_tokens(shown, torch.where(tokens.gone, -1, tokens.assign), patch_size)
    return lay_out(columns, {"input": note})


def draw_tokens(pixels: Tensor, assign: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Patches as they are, as the mean of those that share their token, or faded away.

    Args:
        pixels: ``(B, 3, H, W)`` uint8.
        assign: ``(B, N)``, as in :class:`Tokens`.
        patch_size: height and width of a patch.

    Returns:
        ``(B, 3, s H, s W)`` uint8: small images grow by a whole factor ``s``, so that outlines have room.
    """
    height, width = pixels.shape[2:]
    grid = height // patch_size[0], width // patch_size[1]
    patches = patchify(pixels.float(), patch_size).view(*assign.shape, -1, 3)  # (B, N, p * p, 3)
    alive = assign >= 0
    slot = torch.where(alive, assign, assign.shape[1])  # all that left share a slot that is never looked at
    colours = torch.cat([patches.mean(dim=2), torch.ones_like(slot)[..., None]], dim=2)  # (B, N, 4), to be summed up
    place = slot[..., None].expand_as(colours)
    sums = colours.new_zeros(slot.shape[0], slot.shape[1] + 1, 4).scatter_add(1, place, colours).gather(1, place)
    merged = alive & (sums[..., 3] > 1)  # (B, N)
    patches = torch.where(merged[..., None, None], (sums[..., :3] / sums[..., 3:])[:, :, None], patches)
    patches = torch.where(alive[..., None, None], patches, FADED * PAPER + (1 - FADED) * patches)
    drawn = unpatchify(patches.flatten(2), grid, patch_size, 3).round().byte()
    scale = max(1, tile_size(width, height)[0] // width)
    drawn = drawn.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    edges = _edges(torch.where(merged, slot, -1).view(-1, *grid), [scale * side for side in patch_size])
    colour = drawn.new_tensor(EDGE)[:, None, None]
    return torch.where(edges[:, None], colour, drawn)


def _edges(group: Tensor, cell: Sequence[int]) -> Tensor:
    """Pixels at the rim of a group, ``(B, H, W)`` bool.

    Args:
        group: ``(B, h, w)``, a number for each patch, negative for none.
        cell: height and width of a patch in pixels.
    """
    pixels = group.repeat_interleave(cell[0], dim=1).repeat_interleave(cell[1], dim=2)
    around = F.pad(pixels, (1, 1, 1, 1), value=-2)
    shifted = (around[:, 1:-1, :-2], around[:, 1:-1, 2:], around[:, :-2, 1:-1], around[:, 2:, 1:-1])
    other = torch.stack([pixels != neighbour for neighbour in shifted]).any(dim=0)
    return other & (pixels >= 0)


@torch.no_grad()
def states_of(encoder: Encoder, images: Tensor, columns: int) -> dict[str, Tokens]:
    """Tokens after the blocks that reduce, at most ``columns`` of them, spread over the depth, by title."""
    assert encoder.reduction is not None
    patches, depth = encoder.grid[0] * encoder.grid[1], encoder.depth
    counts = encoder.reduction.counts(patches, depth, encoder.grid)
    before = [patches, *counts]
    reducing = [layer for layer in range(depth) if encoder.reduction.acts(before[layer], counts[layer], layer)]
    layers = spread_over(reducing, columns) or [depth - 1]
    states = encoder.after_blocks(images, layers)
    return {
        f"block {layer}: {_left(tokens)} of {patches}": tokens for layer, tokens in zip(layers, states, strict=True)
    }


def _left(tokens: Tokens) -> int:
    """Tokens that go on; their mean number where it is up to the image."""
    return tokens.count if tokens.alive is None else round(tokens.alive.sum(dim=1).float().mean().item())


def spread_over(numbers: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the numbers, evenly spread, the last among them."""
    count = min(count, len(numbers))
    return [numbers[(place + 1) * len(numbers) // count - 1] for place in range(count)]

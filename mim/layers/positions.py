"""Position tables: the fixed one, and learned ones on another grid."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions(grid: tuple[int, int], dim: int, num_prefix: int = 0) -> Tensor:
    """The 2-D sine-cosine table of MAE (arXiv:2111.06377).

    The first half of the channels encodes the column, the second half the row; each half holds the sines of all
    frequencies, then the cosines.

    Args:
        grid: ``(h, w)`` patches per side.
        dim: width of a token, a multiple of 4.
        num_prefix: rows of zeros put in front, for tokens that have no place in the image.

    Returns:
        ``(1, P + N, D)`` float32.

    Raises:
        ValueError: if ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, not {dim}")
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)  # (D/4,)
    rows, columns = (torch.arange(side, dtype=torch.float64)[:, None] * frequencies for side in grid)
    rows, columns = (torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (rows, columns))  # (h, D/2), (w, D/2)
    height, width = grid
    table = torch.cat([columns.repeat(height, 1), rows.repeat_interleave(width, dim=0)], dim=1)  # (N, D)
    return torch.cat([table.new_zeros(num_prefix, dim), table])[None].float()


def stretch_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], num_prefix: int) -> Tensor:
    """Learned positions on another grid as DINO and iBOT stretch them (arXiv:2104.14294).

    Bicubic without antialiasing, by the factors ``(n + 0.1) / old`` instead of to a size. On the way to smaller grids
    that differs a lot from antialiased resizing; weights that were trained with one rule want the same again.

    Args:
        table: ``(1, P + N, D)``.
        old: ``(h, w)`` of the table.
        new: ``(h, w)`` wanted.
        num_prefix: rows at the front that have no place in the image and stay, ``P``.

    Returns:
        ``(1, P + N', D)``; the table itself if the grids are equal.
    """
    if old == new:
        return table
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:].float()
    square = patches.transpose(1, 2).reshape(1, -1, *old)  # (1, D, h, w)
    factors = [(n + 0.1) / o for n, o in zip(new, old, strict=True)]
    stretched = F.interpolate(square, scale_factor=factors, mode="bicubic")
    return torch.cat([prefix, stretched.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)

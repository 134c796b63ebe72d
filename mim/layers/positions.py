"""Fixed position tables."""

import torch
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

"""Histograms of oriented gradients as targets (MaskFeat, arXiv:2112.09133, 2021).

Deviation: magnitudes are weighted by a window of the size of a patch, which is the paper's for patches of 16 px; cells
are half a patch wide whatever its size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.encoder import Encoder
from mim.patches import patchify
from mim.targets.base import Target, mean_over_values, patch_size_of

_BINS = 9  # directions; opposite ones share a bin
_CELLS = 4  # two by two in a patch
_STROKE = 8  # pixels of a cell in a picture


class HOGTarget(Target):
    """Edges of a patch: a histogram of their directions for each quarter of it and each channel.

    36 values per channel, 108 for colours, in the order (cell, channel, direction); the nine of a cell and a channel
    have length 1 together, or are 0 where nothing changes. The error is the mean squared difference.
    """

    def dim(self, encoder: Encoder) -> int:
        """Four cells times channels times nine directions."""
        height, width = encoder.patch_size
        if height % 2 or width % 2:
            raise ValueError(
                f"patches of {height} x {width} px do not divide into two by two cells; choose an even size"
            )
        return _CELLS * _BINS * encoder.in_chans

    def forward(self, images: Tensor, grid: tuple[int, int], indices: Tensor, weights: Tensor | None = None) -> Tensor:
        """``(B, M, 36 * C)``; see :meth:`Target.forward`."""
        size, channels = patch_size_of(images, grid), images.shape[1]
        # float32 under autocast, too: magnitudes are small differences of pixels.
        magnitude, direction = _gradients(images.float())
        window = _window(*size, images.device)
        magnitude, direction = (
            patchify(magnitude * window.repeat(grid), size, indices),
            patchify(direction, size, indices),
        )
        quarters = (*indices.shape, 2, size[0] // 2, 2, size[1] // 2, channels)
        magnitude, direction = magnitude.view(quarters), direction.view(quarters)
        # Nine sums instead of a scatter, whose order of additions a GPU does not fix.
        bins = [magnitude.where(direction == number, 0).sum(dim=(3, 5)) for number in range(_BINS)]
        return F.normalize(torch.stack(bins, dim=-1), dim=-1).flatten(2)  # (B, M, 2, 2, C, 9) before

    def error(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean of squared differences, ``(B, M)``."""
        return mean_over_values(F.mse_loss(prediction.float(), target, reduction="none"), weights)

    def pictures(self, prediction: Tensor, images: Tensor, grid: tuple[int, int], indices: Tensor) -> dict[str, Tensor]:
        """What is hidden, the edges of the images, and the same with those of hidden patches predicted."""
        everything = torch.arange(grid[0] * grid[1], device=images.device).expand(len(images), -1)
        true = self(images, grid, everything)  # (B, N, 36 * C)
        places = indices[..., None].expand(-1, -1, true.shape[2])
        imagined = true.scatter(1, places, prediction.to(true.dtype))
        shown = {"edges": _strokes(true, grid), "imagined edges": _strokes(imagined, grid)}
        return super().pictures(prediction, images, grid, indices) | shown

    def weights(self, valid: Tensor | None, images: Tensor, grid: tuple[int, int], indices: Tensor) -> Tensor | None:
        """``(B, M, 36 * C)``: 1 for cells measured to the last pixel, neighbours included, in patches that count.

        An edge of what was not measured is none of the image.
        """
        known = super().weights(valid, images, grid, indices)
        if valid is None or known is None:
            return None
        height, width = patch_size_of(images, grid)
        missing = F.max_pool2d((~valid).float(), 3, stride=1, padding=1)
        whole = 1 - F.max_pool2d(missing, (height // 2, width // 2))  # (B, 1, 2h, 2w)
        cells = patchify(whole, 2, indices) * known.amax(dim=-1, keepdim=True)  # (B, M, 4)
        return cells.repeat_interleave(_BINS * images.shape[1], dim=-1)


def _gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude and direction, 0 to 8, of the gradient at every pixel, ``(B, C, H, W)`` each."""
    step = 1 - torch.arange(3.0, device=images.device)  # 1, 0, -1: made there, as a list of numbers would travel
    smooth = 2 - step.abs()
    sobel = torch.stack([smooth[:, None] * step, step[:, None] * smooth])[:, None]  # (2, 1, 3, 3)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect").flatten(0, 1)[:, None]
    across, down = F.conv2d(padded, sobel).reshape(*images.shape[:2], 2, *images.shape[2:]).unbind(2)
    direction = (torch.atan2(across, down) / torch.pi * _BINS).floor().remainder(_BINS)
    return torch.hypot(across, down), direction


def _window(height: int, width: int, device: torch.device) -> Tensor:
    """Gaussian over a patch, its deviation half of a side: ``(height, width)``."""
    sides = (torch.arange(side, device=device) - (side - 1) / 2 for side in (height, width))
    row, column = ((-0.5 * (place / (len(place) / 2)).square()).exp() for place in sides)
    return row[:, None] * column


def _strokes(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Histograms ``(B, N, 36 * C)``, mean over channels, as strokes along the edges: ``(B, 16h, 16w)``, 0 is dark."""
    rows, columns = grid
    cells = values.clamp(min=0).reshape(*values.shape[:-1], 2, 2, -1, _BINS).mean(dim=-2)  # (B, N, 2, 2, 9)
    cells = cells - cells.amin(dim=-1, keepdim=True)  # what all directions have alike is no edge
    cells = cells.view(-1, rows, columns, 2, 2, _BINS).transpose(2, 3)  # (B, h, 2, w, 2, 9)
    drawn = torch.einsum("bhywxd,dij->bhyiwxj", cells, _templates(values.device))
    return drawn.reshape(len(values), 2 * rows * _STROKE, 2 * columns * _STROKE)


def _templates(device: torch.device) -> Tensor:
    """A stroke through the middle of a cell for each direction, across its gradient: ``(9, 8, 8)``."""
    place = torch.arange(_STROKE, device=device) - (_STROKE - 1) / 2
    angle = (torch.arange(_BINS, device=device) + 0.5) * torch.pi / _BINS
    # The angle is measured from down towards across, as atan2(across, down) in the gradients.
    distance = angle.cos()[:, None, None] * place[:, None] + angle.sin()[:, None, None] * place
    return (1 - distance.abs()).clamp(min=0)

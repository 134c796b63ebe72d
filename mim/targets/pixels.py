"""Pixels as targets: those of MAE (arXiv:2111.06377) and of SimMIM (arXiv:2111.09886)."""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from mim.encoder import Encoder
from mim.patches import by_channel, from_channels, patch_statistics, patchify, pixel_targets
from mim.targets.base import Target, mean_over_values, patch_size_of

_DISTANCES: dict[str, Callable[..., Tensor]] = {"squared": F.mse_loss, "absolute": F.l1_loss}


class PixelTarget(Target):
    """The pixels of a patch and their mean squared error (MAE, arXiv:2111.06377).

    Args:
        standardise: standardise pixels within their patch, all channels together (``true``, as in MAE) or each one by
            itself (``channel``); as they are otherwise. Together, what differs most between channels is the target: of
            bands whose levels vary from image to image, those levels, which any visible patch tells, and no structure.
        distance: what is averaged: ``squared`` differences, or ``absolute`` ones (SimMIM, arXiv:2111.09886).
    """

    def __init__(
        self,
        standardise: bool | Literal["channel"] = False,
        distance: Literal["squared", "absolute"] = "squared",
    ) -> None:
        super().__init__()
        if distance not in _DISTANCES:
            raise ValueError(f"distance {distance} is none of {', '.join(_DISTANCES)}")
        if standardise not in (True, False, "channel"):
            raise ValueError(f"standardise {standardise} is none of true, false, channel")
        self.standardise, self.distance = standardise, distance

    def dim(self, encoder: Encoder) -> int:
        """Pixels times channels."""
        height, width = encoder.patch_size
        return height * width * encoder.in_chans

    def forward(self, images: Tensor, grid: tuple[int, int], indices: Tensor, weights: Tensor | None = None) -> Tensor:
        """``(B, M, p*p*C)``; see :meth:`Target.forward`."""
        if not self.standardise:
            return patchify(images, patch_size_of(images, grid), indices)
        if self.standardise == "channel":
            patches = by_channel(patchify(images, patch_size_of(images, grid), indices), images.shape[1])
            own = None if weights is None else by_channel(weights, images.shape[1])
            mean, std = patch_statistics(patches, own)
            return from_channels((patches - mean) / std)
        return pixel_targets(images, patch_size_of(images, grid), indices, weights)

    def error(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean of squared or absolute differences, ``(B, M)``."""
        error = _DISTANCES[self.distance](prediction.float(), target.float(), reduction="none")
        return mean_over_values(error, weights)

    def loss(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean difference, without weights in one sum, which is faster than that of :meth:`error`."""
        if weights is None:
            return _DISTANCES[self.distance](prediction.float(), target.float())
        return super().loss(prediction, target, weights)

    def to_pixels(self, prediction: Tensor, images: Tensor, grid: tuple[int, int], indices: Tensor) -> Tensor:
        """Pixels ``(B, M, p*p*C)``.

        Standardised predictions get the mean and deviation of the true patch, which the model cannot know.
        """
        if not self.standardise:
            return prediction
        patches = patchify(images, patch_size_of(images, grid), indices)
        if self.standardise == "channel":
            mean, std = patch_statistics(by_channel(patches, images.shape[1]))
            return from_channels(by_channel(prediction, images.shape[1]) * std + mean)
        mean, std = patch_statistics(patches)
        return prediction * std + mean

"""What every target is: a value to predict for each patch, and the error of a prediction."""

from collections.abc import Sequence

from torch import Tensor, nn

from mim.encoder import Encoder
from mim.patches import measured_values, replace_patches


class Target(nn.Module):
    """A value to predict for every patch, and the error of a prediction."""

    def dim(self, encoder: Encoder) -> int:
        """Values per patch for images that ``encoder`` takes; raises ValueError if there are none for such images."""
        raise NotImplementedError

    def forward(self, images: Tensor, grid: tuple[int, int], indices: Tensor, weights: Tensor | None = None) -> Tensor:
        """The targets of chosen patches.

        Args:
            images: ``(B, C, H, W)``, normalised.
            grid: ``(h, w)`` patches per side.
            indices: ``(B, M)`` patches wanted per image.
            weights: see :meth:`weights`.

        Returns:
            ``(B, M, dim)`` without a gradient.
        """
        raise NotImplementedError

    def error(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """How far off every patch is: two ``(B, M, dim)`` to ``(B, M)`` float32; 0 where nothing was measured."""
        raise NotImplementedError

    def weights(self, valid: Tensor | None, images: Tensor, grid: tuple[int, int], indices: Tensor) -> Tensor | None:
        """Which values of patches were measured, where images have nodata.

        Args:
            valid: ``(B, 1, H, W)`` bool; None if all of every image was measured, as is the result then.
            images: ``(B, C, H, W)``.
            grid: ``(h, w)`` patches per side.
            indices: ``(B, M)`` patches wanted per image.

        Returns:
            ``(B, M, p*p*C)`` of 0 and 1; only 0 for a patch that is mostly nodata and therefore no target.
        """
        if valid is None:
            return None
        return measured_values(valid, patch_size_of(images, grid), images.shape[1], indices)

    def loss(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean error of the patches that are targets: two ``(B, M, dim)`` to a scalar."""
        return self.mean_error(self.errors(prediction, target, weights), weights)

    def measured(
        self, images: Tensor, grid: tuple[int, int], indices: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Targets ``(B, M, dim)`` and their :meth:`weights`; a target that knows no weights serves without nodata."""
        weights = self.weights(valid, images, grid, indices)
        parts = (images, grid, indices) if weights is None else (images, grid, indices, weights)
        return self(*parts), weights

    def errors(self, prediction: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        """:meth:`error` ``(B, M)``, with weights only if there are any."""
        return self.error(prediction, target) if weights is None else self.error(prediction, target, weights)

    def mean_error(self, error: Tensor, weights: Tensor | None) -> Tensor:
        """Mean of ``(B, M)`` over the patches that are targets."""
        if weights is None:
            return error.mean()
        counted = weights.amax(dim=-1)  # (B, M)
        return (error * counted).sum() / counted.sum().clamp(min=1)

    def check(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Refuses a run that normalises images with another mean and deviation than the target expects.

        Raises:
            UserError: that names the options to change.
        """

    def to_pixels(self, prediction: Tensor, images: Tensor, grid: tuple[int, int], indices: Tensor) -> Tensor | None:
        """Predictions ``(B, M, dim)`` as patches of pixels ``(B, M, p*p*C)`` for display; None if they show nothing."""
        return None

    def pictures(self, prediction: Tensor, images: Tensor, grid: tuple[int, int], indices: Tensor) -> dict[str, Tensor]:
        """``images`` with the patches ``indices (B, M)`` grey, and with what was predicted there if it is pixels."""
        size, pixels = patch_size_of(images, grid), self.to_pixels(prediction, images, grid, indices)
        hidden = {"hidden": replace_patches(images, size, indices, 0.0)}
        return hidden if pixels is None else hidden | {"reconstruction": replace_patches(images, size, indices, pixels)}


def patch_size_of(images: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    """Patch height and width in pixels."""
    return images.shape[2] // grid[0], images.shape[3] // grid[1]


def mean_over_values(error: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the values of a patch, or over those that count: ``(B, M, dim)`` each to ``(B, M)``."""
    if weights is None:
        return error.mean(dim=-1)
    return (error * weights).sum(dim=-1) / weights.sum(dim=-1).clamp(min=1)

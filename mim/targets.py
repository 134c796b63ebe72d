"""What a decoder has to predict for hidden patches: their pixels, or what another network makes of them."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.encoder import Encoder
from mim.errors import UserError
from mim.options.ranges import Positive
from mim.patches import gather_tokens, measured_values, patch_statistics, patchify, pixel_targets


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
        return measured_values(valid, _patch_size(images, grid), images.shape[1], indices)

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


class PixelTarget(Target):
    """The pixels of a patch and their mean squared error (MAE, arXiv:2111.06377).

    Args:
        standardise: standardise pixels within their patch; as they are otherwise.
    """

    def __init__(self, standardise: bool = False) -> None:
        super().__init__()
        self.standardise = standardise

    def dim(self, encoder: Encoder) -> int:
        """Pixels times channels."""
        height, width = encoder.patch_size
        return height * width * encoder.in_chans

    def forward(self, images: Tensor, grid: tuple[int, int], indices: Tensor, weights: Tensor | None = None) -> Tensor:
        """``(B, M, p*p*C)``; see :meth:`Target.forward`."""
        if not self.standardise:
            return patchify(images, _patch_size(images, grid), indices)
        return pixel_targets(images, _patch_size(images, grid), indices, weights)

    def error(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean of squared differences, ``(B, M)``."""
        error = F.mse_loss(prediction.float(), target.float(), reduction="none")
        if weights is None:
            return error.mean(dim=-1)
        return (error * weights).sum(dim=-1) / weights.sum(dim=-1).clamp(min=1)

    def loss(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean of squared differences, without weights in one sum, which is faster than that of :meth:`error`."""
        if weights is None:
            return F.mse_loss(prediction.float(), target.float())
        return super().loss(prediction, target, weights)

    def to_pixels(self, prediction: Tensor, images: Tensor, grid: tuple[int, int], indices: Tensor) -> Tensor:
        """Pixels ``(B, M, p*p*C)``.

        Standardised predictions get the mean and deviation of the true patch, which the model cannot know.
        """
        if not self.standardise:
            return prediction
        mean, std = patch_statistics(patchify(images, _patch_size(images, grid), indices))
        return prediction * std + mean


class FeatureTarget(Target):
    """What a frozen ViT makes of the whole image at the place of a patch (HPM, arXiv:2312.13714).

    Prediction and target are scaled to length 1 and the error is their squared distance: 0 to 4, twice one minus the
    cosine. Images are resized so that the frozen ViT's patches cover the same places; its weights become part of the
    checkpoints.

    Args:
        model: timm name of a pretrained ViT, such as ``vit_base_patch16_clip_224.openai``, or ``local-dir:FOLDER``.
        mean: per channel, that the run normalises images with; ImageNet's, as by default, unless ``data.mean`` is set.
        std: as ``mean``.
        projection: the tokens go through the model's head, too, as CLIP's do in the official HPM: 512 values instead of
            768, from the weights of ``vit_base_patch16_clip_224.openai``. The model must have a linear head.
        own_normalisation: the frozen ViT sees images normalised as it was trained; as the run normalises them if not,
            which is what the official HPM does.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: str,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[Positive, ...] = (0.229, 0.224, 0.225),
        projection: bool = False,
        own_normalisation: bool = True,
    ) -> None:
        super().__init__()
        self.projection = projection
        kwargs = {"num_classes": None} if projection else None  # as many as the weights have
        try:
            self.encoder = Encoder(model, dynamic_img_size=True, pretrained=True, kwargs=kwargs)
        except UserError as error:  # which speaks of the encoder that is trained
            raise error.about("--model.init_args.target.init_args.model", instead_of="--model") from None
        self.expected = [list(mean), list(std)]
        self.encoder.eval().requires_grad_(False)
        if projection and not isinstance(self.encoder.vit.head, nn.Linear):
            raise UserError(
                f"--model.init_args.target.init_args.projection: {model} has no linear head",
                hint="projection: false   or a model with a head, such as CLIP's",
            )
        expected = self.encoder.statistics if own_normalisation else (mean, std)
        given_mean, given_std, own_mean, own_std = (
            torch.tensor(values).view(-1, 1, 1) for values in (mean, std, *expected)
        )
        # From the run's normalisation to the frozen ViT's in one product and one sum.
        self.register_buffer("scale", given_std / own_std, persistent=False)
        self.register_buffer("shift", (given_mean - own_mean) / own_std, persistent=False)

    def check(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """See :meth:`Target.check`."""
        if all(
            torch.allclose(torch.tensor(a), torch.tensor(b)) for a, b in zip(self.expected, (mean, std), strict=True)
        ):
            return
        texts = ["[" + ",".join(f"{number:.6g}" for number in numbers) + "]" for numbers in (mean, std)]
        option = "--model.init_args.target.init_args"
        raise UserError(
            "the frozen target network expects images that are normalised in another way than this run's",
            why=f"the run's mean is {texts[0]}, its deviation {texts[1]}",
            hint=f"{option}.mean {texts[0]} {option}.std {texts[1]}",
        )

    def train(self, mode: bool = True) -> "FeatureTarget":
        """Leaves the frozen network in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def dim(self, encoder: Encoder) -> int:
        """Width of the frozen ViT, or of its projection."""
        if encoder.in_chans != self.encoder.in_chans:
            raise ValueError(f"the target's ViT takes {self.encoder.in_chans} channels, images have {encoder.in_chans}")
        return cast(nn.Linear, self.encoder.vit.head).out_features if self.projection else self.encoder.dim

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int], indices: Tensor, weights: Tensor | None = None) -> Tensor:
        """``(B, M, dim)`` of length 1; see :meth:`Target.forward`."""
        images = images * self.scale + self.shift
        size = [patches * side for patches, side in zip(grid, self.encoder.patch_size, strict=True)]
        if list(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        tokens = gather_tokens(self.encoder(images)[:, self.encoder.num_prefix :], indices)  # (B, M, D)
        if self.projection:
            tokens = self.encoder.vit.head(self.encoder.vit.fc_norm(tokens))
        return F.normalize(tokens.float(), dim=-1)

    def error(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Squared distance between directions, ``(B, M)``."""
        error = (F.normalize(prediction.float(), dim=-1) - target).square().sum(dim=-1)
        return error if weights is None else error * weights.amax(dim=-1)


def _patch_size(images: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    return images.shape[2] // grid[0], images.shape[3] // grid[1]

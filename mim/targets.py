"""What a decoder has to predict for hidden patches: their pixels, or what another network makes of them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.encoder import Encoder
from mim.errors import UserError
from mim.options.ranges import Positive
from mim.patches import gather_tokens, patch_statistics, patchify, pixel_targets


class Target(nn.Module):
    """A value to predict for every patch, and the error of a prediction."""

    def dim(self, encoder: Encoder) -> int:
        """Values per patch for images that ``encoder`` takes; raises ValueError if there are none for such images."""
        raise NotImplementedError

    def forward(self, images: Tensor, grid: tuple[int, int], indices: Tensor) -> Tensor:
        """The targets of chosen patches.

        Args:
            images: ``(B, C, H, W)``, normalised.
            grid: ``(h, w)`` patches per side.
            indices: ``(B, M)`` patches wanted per image.

        Returns:
            ``(B, M, dim)`` without a gradient.
        """
        raise NotImplementedError

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """How far off every patch is: two ``(B, M, dim)`` to ``(B, M)`` float32."""
        raise NotImplementedError

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean error of all patches: two ``(B, M, dim)`` to a scalar."""
        return self.error(prediction, target).mean()

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

    def forward(self, images: Tensor, grid: tuple[int, int], indices: Tensor) -> Tensor:
        """``(B, M, p*p*C)``; see :meth:`Target.forward`."""
        return (pixel_targets if self.standardise else patchify)(images, _patch_size(images, grid), indices)

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean of squared differences, ``(B, M)``."""
        return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=-1)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean of squared differences in one sum, which is faster than that of :meth:`error`."""
        return F.mse_loss(prediction.float(), target.float())

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
        self.encoder.eval().requires_grad_(False)
        if projection and not isinstance(self.encoder.vit.head, nn.Linear):
            raise UserError(
                f"--model.init_args.target.init_args.projection: {model} has no linear head",
                hint="--model.init_args.target.init_args.projection false",
            )
        expected = self.encoder.statistics if own_normalisation else (mean, std)
        given_mean, given_std, own_mean, own_std = (
            torch.tensor(values).view(-1, 1, 1) for values in (mean, std, *expected)
        )
        # From the run's normalisation to the frozen ViT's in one product and one sum.
        self.register_buffer("scale", given_std / own_std, persistent=False)
        self.register_buffer("shift", (given_mean - own_mean) / own_std, persistent=False)

    def train(self, mode: bool = True) -> "FeatureTarget":
        """Leaves the frozen network in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def dim(self, encoder: Encoder) -> int:
        """Width of the frozen ViT, or of its projection."""
        if encoder.in_chans != self.encoder.in_chans:
            raise ValueError(f"the target's ViT takes {self.encoder.in_chans} channels, images have {encoder.in_chans}")
        return int(self.encoder.vit.head.out_features) if self.projection else self.encoder.dim

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int], indices: Tensor) -> Tensor:
        """``(B, M, dim)`` of length 1; see :meth:`Target.forward`."""
        images = images * self.scale + self.shift
        size = [patches * side for patches, side in zip(grid, self.encoder.patch_size, strict=True)]
        if list(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        tokens = gather_tokens(self.encoder(images)[:, self.encoder.num_prefix :], indices)  # (B, M, D)
        if self.projection:
            tokens = self.encoder.vit.head(self.encoder.vit.fc_norm(tokens))
        return F.normalize(tokens.float(), dim=-1)

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Squared distance between directions, ``(B, M)``."""
        return (F.normalize(prediction.float(), dim=-1) - target).square().sum(dim=-1)


def _patch_size(images: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    return images.shape[2] // grid[0], images.shape[3] // grid[1]

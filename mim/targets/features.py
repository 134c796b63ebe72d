"""Features of a frozen network as targets."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.encoder import Encoder
from mim.errors import UserError
from mim.options.ranges import Positive
from mim.patches import gather_tokens
from mim.targets.base import Target


class FeatureTarget(Target):
    """What a frozen ViT makes of the whole image at the place of a patch (arXiv:2203.05175, 2312.13714).

    Images are resized so that the frozen ViT's patches cover the same places; its weights become part of the
    checkpoints.

    Args:
        model: timm name of a pretrained ViT, such as ``vit_base_patch16_clip_224.openai``, or ``local-dir:FOLDER``.
        mean: per channel, that the run normalises images with; ImageNet's, as by default, unless ``data.mean`` is set.
        std: as ``mean``.
        projection: the tokens go through the model's head, too, as CLIP's do in the official HPM: 512 values instead of
            768, from the weights of ``vit_base_patch16_clip_224.openai``. The model must have a linear head.
        own_normalisation: the frozen ViT sees images normalised as it was trained; as the run normalises them if not,
            which is what the official HPM does.
        distance: ``direction`` scales prediction and target to length 1, and the error is their squared distance: 0 to
            4, twice one minus the cosine. ``smooth`` standardises the target over its values, and the error is the
            mean of the smooth absolute difference, squared below 1.
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
        distance: Literal["direction", "smooth"] = "direction",
    ) -> None:
        super().__init__()
        if distance not in ("direction", "smooth"):
            raise ValueError(f"distance {distance} is none of direction and smooth")
        self.projection, self.distance = projection, distance
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
        """``(B, M, dim)``, of length 1 or standardised; see :meth:`Target.forward`."""
        images = images * self.scale + self.shift
        size = [patches * side for patches, side in zip(grid, self.encoder.patch_size, strict=True)]
        if list(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        tokens = gather_tokens(self.encoder(images)[:, self.encoder.num_prefix :], indices)  # (B, M, D)
        if self.projection:
            tokens = self.encoder.vit.head(self.encoder.vit.fc_norm(tokens))
        if self.distance == "smooth":
            return F.layer_norm(tokens.float(), tokens.shape[-1:])
        return F.normalize(tokens.float(), dim=-1)

    def error(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Squared distance between directions, or mean smooth absolute difference, ``(B, M)``."""
        if self.distance == "smooth":
            error = F.smooth_l1_loss(prediction.float(), target, reduction="none").mean(dim=-1)
        else:
            error = (F.normalize(prediction.float(), dim=-1) - target).square().sum(dim=-1)
        return error if weights is None else error * weights.amax(dim=-1)

"""The adapter over timm's conv nets: encode all places of an image, or only the visible ones."""

from collections.abc import Collection
from typing import Any, Literal, cast, final

import timm
import torch
from torch import Tensor, nn

from mim.conv_nets import ConvNet
from mim.errors import UserError
from mim.layers.visible import enlarged, only_visible, unknown_layers
from mim.options.ranges import Count, ShareBelowOne
from mim.options.timm_names import no_such_model
from mim.patches import patch_grid
from mim.reduction.tokens import Tokens
from mim.vit import without_weights

_TRY = "--model resnet50   or   --model convnext_tiny"


@final
class ConvEncoder(nn.Module):
    """A timm ResNet or ConvNeXt, places of which can be hidden; to probes and pictures a model of ``N`` tokens.

    A token is a place of the last stage, and its patch the square of pixels, 32 to a side, that the net makes one of.

    Args:
        model: timm name of a ResNet or ConvNeXt, or ``local-dir:FOLDER`` for an exported one.
        img_size: image side in pixels, or ``[height, width]``; the model's own if not given.
        in_chans: image channels; the model's own if not given.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        pretrained: start from timm's weights.
        kwargs: further arguments of the timm model, such as ``{channels: [32, 64, 128, 256]}``.
    """

    behind_patches = ("norm_pre", "head")
    """Parts of timm's model that are not on the way to the last stage."""
    num_prefix, depth, any_size = 0, 1, True
    has_class_token, has_class_attention = False, False
    pool: Literal["mean"] = "mean"
    grid: tuple[int, int]

    def __init__(
        self,
        model: str,
        img_size: Count | tuple[Count, Count] | None = None,
        in_chans: Count | None = None,
        drop_path_rate: ShareBelowOne = 0.0,
        pretrained: bool = False,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.pretrained, self.reduction = pretrained, None
        _refuse(model)
        settings = {"in_chans": in_chans, "drop_path_rate": drop_path_rate, "num_classes": 0, **(kwargs or {})}
        settings = {name: value for name, value in settings.items() if value is not None}
        try:
            net = timm.create_model(model, pretrained=pretrained, **settings)
        except OSError as problem:
            hint = "--model local-dir:FOLDER with weights on this machine, or a network connection"
            why = str(problem).partition("\n")[0]
            raise UserError(f"--model {model}: timm could not get its pretrained weights", why=why, hint=hint) from None
        except (TypeError, AssertionError) as problem:  # of an argument that it does not take
            raise UserError(f"--model {model} cannot be built with {kwargs}", why=str(problem)) from problem
        self.vit = cast(ConvNet, net)  # under the name of the other encoder's model, which state dicts keep
        if unknown := unknown_layers(nn.Sequential(*_body(self.vit))):
            raise UserError(
                f"--model {model} has layers that may look at hidden places: {', '.join(unknown)}",
                why="every layer must work on visible places alone",
                hint=_TRY,
            )
        stages = cast(Any, self.vit).feature_info
        stages = [stage for stage in getattr(stages, "info", stages) if stage["reduction"] > 2]
        self.widths: list[int] = [stage["num_chs"] for stage in stages]
        self.strides: list[int] = [stage["reduction"] for stage in stages]
        if self.strides[-1] != 32:
            raise UserError(f"--model {model}: one place of its last stage is {self.strides[-1]} pixels, not 32")
        for name in self.behind_patches:  # which pretraining does not reach
            getattr(self.vit, name, nn.Identity()).requires_grad_(False)
        self.img_size = self._sized(model, img_size)
        self.grid = self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    def _sized(self, model: str, img_size: int | tuple[int, int] | None) -> tuple[int, int]:
        own = cast(dict[str, Any], self.vit.pretrained_cfg)["input_size"][1:]
        height, width = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size or own)
        stride = self.strides[-1]
        if height % stride or width % stride:
            near = [max(1, round(side / stride)) * stride for side in (height, width)]
            if img_size is None:  # timm's default for a net that takes any size, as 176 px of resnet10t
                return near[0], near[1]
            asked = near[0] if near[0] == near[1] else f"[{near[0]},{near[1]}]"
            raise UserError(
                f"--img_size {height}x{width} does not divide by {stride}, the side of a place of {model}",
                hint=f"--img_size {asked}",
            )
        return height, width

    @property
    def dim(self) -> int:
        """Channels ``D`` of the last stage."""
        return self.widths[-1]

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width in pixels of what one place of the last stage stands for."""
        return self.strides[-1], self.strides[-1]

    @property
    def in_chans(self) -> int:
        """Image channels ``C``."""
        return next(layer for layer in self.vit.modules() if isinstance(layer, nn.Conv2d)).in_channels

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation, per channel, of the pixels in 0..1 that timm's weights of this model expect."""
        expected = cast(dict[str, Any], self.vit.pretrained_cfg)
        return list(expected["mean"]), list(expected["std"])

    def stages(self, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Maps ``(B, widths[i], H / strides[i], W / strides[i])`` behind the stages, the finest first.

        Args:
            images: ``(B, C, H, W)``.
            mask: ``(B, N)`` bool, True = hidden: maps are 0 there, and pixels there change nothing anywhere.
        """
        grid = patch_grid(images, self.patch_size)
        if mask is None:
            return self._maps(images)
        if mask.shape != (len(images), grid[0] * grid[1]):
            raise ValueError(f"mask is {tuple(mask.shape)}, but there are {len(images)} images of {grid} places")
        visible = (~mask).view(-1, 1, *grid).to(images.dtype)  # (B, 1, h, w)
        with only_visible(self.vit, visible):
            shown = enlarged(visible, (images.shape[2], images.shape[3]))
            return self._maps(torch.where(shown.bool(), images, images.new_zeros(())))

    def _maps(self, images: Tensor) -> list[Tensor]:
        maps = cast(list[Tensor], self.vit.forward_intermediates(images, intermediates_only=True))
        return maps[-len(self.strides) :]

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Places of the last stage in raster order, ``(B, N, D)``, 0 where ``mask (B, N)`` hides them."""
        return self.stages(images, mask)[-1].flatten(2).transpose(1, 2)

    def forward_tokens(self, images: Tensor) -> Tokens:
        """As :meth:`forward`, with the map that tells which token is which place."""
        return Tokens.start(self(images), 0, patch_grid(images, self.patch_size))

    def after_blocks(self, images: Tensor, layers: Collection[int]) -> list[Tokens]:
        """Tokens of the last stage: the whole net counts as one block."""
        return [self.forward_tokens(images) for _ in layers]

    def normed(self, tokens: Tensor) -> Tensor:
        """The same: the norm of a ConvNeXt stands behind the pooling, a ResNet has none."""
        return tokens

    def mean_of(self, tokens: Tokens) -> Tensor:
        """Mean over places as timm's model pools them, ``(B, D)``; a ConvNeXt norms it."""
        places = getattr(self.vit, "norm_pre", nn.Identity())(self.dense(tokens))
        pooled: Tensor = self.vit.forward_head(places, pre_logits=True)
        return pooled

    def dense(self, tokens: Tokens) -> Tensor:
        """Tokens as a map ``(B, D, h, w)``, as timm's ``features_only`` gives it."""
        assert tokens.grid is not None
        return tokens.x.transpose(1, 2).reshape(len(tokens.x), -1, *tokens.grid)

    def feature_map(self, images: Tensor) -> Tensor:
        """The last stage's map, ``(B, D, h, w)``."""
        return self.stages(images)[-1]


def _body(net: ConvNet) -> list[nn.Module]:
    """What lies between pixels and the last stage."""
    behind = (*ConvEncoder.behind_patches, "fc", "global_pool")
    return [part for name, part in net.named_children() if name not in behind]


def is_conv_net(model: str) -> bool:
    """Whether timm's model of that name, or the exported one, is a conv net of a known family."""
    try:
        with without_weights():
            return isinstance(timm.create_model(model, num_classes=0), ConvNet)
    except (RuntimeError, ValueError, OSError):
        return False


def _refuse(model: str) -> None:
    """Raises ``UserError`` for what is no conv net of a known family."""
    try:
        with without_weights():
            skeleton = timm.create_model(model, num_classes=0)
    except (RuntimeError, ValueError) as error:
        if not str(error).startswith(("Unknown model", "Invalid pretrained tag", "Model name")):
            raise
        raise no_such_model(model) from None
    if not isinstance(skeleton, ConvNet):
        raise UserError(
            f"--model {model} is neither a ResNet nor a ConvNeXt",
            why=f"it is timm's {type(skeleton).__name__}, and this method hides places of conv nets",
            hint=_TRY,
        )

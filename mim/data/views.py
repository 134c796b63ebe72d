"""From a decoded image to what a method sees: crops in the loader's workers, the batched rest on the model's device.

The division is measured: a worker that crops uint8 tensors and ships uint8 is the cheapest part of the pipeline, while
colour, blur and normalisation cost least as one batched operation beside the model, on a CPU, too (docs/speed.md).
"""

import math
from collections.abc import Callable, Sequence

import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
    normalize,
    solarize,
)
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mim.distributed.devices import send
from mim.errors import UserError
from mim.options.ranges import Count, Positive, Share, SomeShare, Whole, check_rising
from mim.randomness import RowGenerator

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Views(nn.Module):
    """How many views of an image a method gets, and how they are made.

    A subclass writes :meth:`crop`; one that changes colours overrides :meth:`forward`, too. The size of a (global) view
    and the channel statistics are the encoder's: :meth:`configure` sets them before the first image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.configure((224, 224), IMAGENET_MEAN, IMAGENET_STD)

    def configure(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        """Sets height and width of a view and the statistics, on a scale of 0 to 1, that it is normalised with."""
        self.size = size
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def check(self, patch_size: tuple[int, int]) -> None:
        """Refuses views, other than those of the encoder's own size, that patches of this height and width cannot tile.

        Raises:
            UserError: that names the option to change.
        """

    def crop(self, image: Tensor) -> list[Tensor]:
        """Cuts ``(C, H, W)`` uint8 into ``V`` views ``(C, H_v, W_v)`` uint8; draws from torch's global generator."""
        raise NotImplementedError

    def center(self, image: Tensor) -> Tensor:
        """The middle of ``(C, H, W)`` uint8 at view size, for probes and pictures: nothing random."""
        height, width = self.size
        scale = max(height / image.shape[-2], width / image.shape[-1])
        full = [max(height, round(image.shape[-2] * scale)), max(width, round(image.shape[-1] * scale))]
        resized = F.resize(image, full, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        middle: Tensor = F.center_crop(resized, [height, width])
        return middle

    def normalize(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` uint8 to floats with the configured mean and standard deviation."""
        return normalize(images.float().div(255), self.mean, self.std)

    def forward(self, views: list[Tensor], generator: RowGenerator) -> list[Tensor]:
        """Batches of uint8 views to what the model takes, on the device the batches are on.

        Args:
            views: ``V x (B, C, H_v, W_v)`` uint8.
            generator: random numbers of each image, on the CPU: what is decided there never waits for a GPU.
        """
        return [self.normalize(view) for view in views]


class SingleView(Views):
    """One random resized crop and a flip: all the augmentation that MAE and HPM want (arXiv:2111.06377, table 8).

    Args:
        scale: smallest and largest share of the image's area in a crop.
        ratio: narrowest and widest aspect of a crop.
        flip: probability of a horizontal flip; 0 where left and right mean something.
    """

    def __init__(
        self,
        scale: tuple[SomeShare, SomeShare] = (0.2, 1.0),
        ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3),
        flip: Share = 0.5,
    ) -> None:
        check_rising("--data.views.init_args.scale", scale)
        check_rising("--data.views.init_args.ratio", ratio)
        self.scale, self.ratio, self.flip = scale, ratio, flip
        super().__init__()

    def configure(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        """See :meth:`Views.configure`."""
        super().configure(size, mean, std)
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, self.scale, self.ratio, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(self.flip),
            ]
        )

    def crop(self, image: Tensor) -> list[Tensor]:
        """One crop ``(C, H, W)`` uint8."""
        return [self.transform(image)]


class MultiCrop(Views):
    """Two global and several small crops in the colours of iBOT (arXiv:2111.07832, after DINO, arXiv:2104.14294).

    Every crop: colours jittered (brightness and contrast by 0.4, saturation by 0.2, hue by 0.1) with probability 0.8,
    grey with 0.2. Blurred are the first global crop always, the second with probability 0.1, small ones with 0.5; the
    second is solarised with probability 0.2. Images without exactly three channels keep saturation and hue.

    Args:
        global_scale: smallest and largest share of the image's area in a global crop.
        local_scale: the same for a small crop.
        local_crops: number of small crops.
        local_size: side of a small crop in pixels, a multiple of the patch size.
        flip: probability of a horizontal flip; 0 where left and right mean something.
        blur: smallest and largest deviation of the blur in pixels; the recipe's is made for 224 px.
    """

    def __init__(
        self,
        global_scale: tuple[SomeShare, SomeShare] = (0.25, 1.0),
        local_scale: tuple[SomeShare, SomeShare] = (0.05, 0.25),
        local_crops: Whole = 10,
        local_size: Count = 96,
        flip: Share = 0.5,
        blur: tuple[Positive, Positive] = (0.1, 2.0),
    ) -> None:
        check_rising("--data.views.init_args.global_scale", global_scale)
        check_rising("--data.views.init_args.local_scale", local_scale)
        check_rising("--data.views.init_args.blur", blur)
        self.global_scale, self.local_scale, self.flip = global_scale, local_scale, flip
        self.local_crops, self.local_size, self.blur = local_crops, local_size, blur
        super().__init__()

    def configure(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        """See :meth:`Views.configure`."""
        super().configure(size, mean, std)
        bicubic, flip = v2.InterpolationMode.BICUBIC, v2.RandomHorizontalFlip(self.flip)
        small = (self.local_size, self.local_size)
        self.large_crop = v2.Compose([v2.RandomResizedCrop(size, self.global_scale, interpolation=bicubic), flip])
        self.small_crop = v2.Compose([v2.RandomResizedCrop(small, self.local_scale, interpolation=bicubic), flip])

    def check(self, patch_size: tuple[int, int]) -> None:
        """See :meth:`Views.check`."""
        step = math.lcm(*patch_size)
        if self.local_crops and self.local_size % step:
            option = "--data.views.init_args.local_size"
            raise UserError(
                f"{option} {self.local_size} does not divide into patches of {patch_size[0]} x {patch_size[1]}",
                hint=f"{option} {math.ceil(self.local_size / step) * step}",
            )

    def crop(self, image: Tensor) -> list[Tensor]:
        """Two global crops ``(C, H, W)`` and the small ones, all uint8."""
        return [self.large_crop(image) for _ in range(2)] + [self.small_crop(image) for _ in range(self.local_crops)]

    def forward(self, views: list[Tensor], generator: RowGenerator) -> list[Tensor]:
        """See :meth:`Views.forward`."""
        chances = [(1.0, 0.0), (0.1, 0.2)] + [(0.5, 0.0)] * self.local_crops  # of blur and of solarisation
        return [
            normalize(self._recolour(view.float().div(255), generator.rand(13), *chance), self.mean, self.std)
            for view, chance in zip(views, chances, strict=True)
        ]

    def _recolour(self, images: Tensor, numbers: Tensor, blur: float, solarised: float) -> Tensor:
        """Changes ``(B, C, H, W)`` in [0, 1] in place, by ``numbers (B, 13)`` uniform on [0, 1)."""
        jittered, grey, blurred, inverted = (numbers[:, :4] < torch.tensor([0.8, 0.2, blur, solarised])).unbind(1)
        _jitter(images, jittered, numbers[:, 4:8], numbers[:, 8:12].argsort(dim=1))
        if images.shape[1] == 3:
            _change(images, grey, lambda chosen: rgb_to_grayscale(chosen).expand(-1, 3, -1, -1))
        low, high = self.blur
        reach = min(math.ceil(3 * high), min(images.shape[2:]) - 1)  # of the kernel; less than the image, as it mirrors
        deviations = (low + (high - low) * numbers[:, 12:]).expand(-1, 2)
        _change(images, blurred, lambda chosen, sigma: gaussian_blur2d(chosen, 2 * reach + 1, sigma), deviations)
        _change(images, inverted, solarize)
        return images


_STRENGTHS = (0.4, 0.4, 0.2, 0.1)  # of brightness, contrast, saturation and hue


def _jitter(images: Tensor, chosen: Tensor, numbers: Tensor, order: Tensor) -> None:
    """The colour jitter of torchvision, in place; every image has its own factors and its own order.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        chosen: ``(B,)`` bool, which images.
        numbers: ``(B, 4)`` uniform on [0, 1): from weakest to strongest.
        order: ``(B, 4)``: which adjustment comes first, second, third and last.
    """
    adjustments: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda pixels, shift: adjust_brightness_accumulative(pixels, 1 + shift),
        lambda pixels, shift: adjust_contrast_with_mean_subtraction(pixels, 1 + shift),
        lambda pixels, shift: adjust_saturation_with_gray_subtraction(pixels, 1 + shift),
        lambda pixels, shift: adjust_hue(pixels, shift * (2 * math.pi)),
    ]
    shifts = (2 * numbers - 1) * torch.tensor(_STRENGTHS)
    for place in order.unbind(1):
        for number, adjust in enumerate(adjustments[: 4 if images.shape[1] == 3 else 2]):
            _change(images, chosen & (place == number), adjust, shifts[:, number])


def _change(images: Tensor, chosen: Tensor, change: Callable[..., Tensor], *numbers: Tensor) -> None:
    """Puts ``change(images, *numbers)`` in the place of the ``chosen (B,)`` images; the rest costs nothing.

    ``chosen`` and ``numbers (B, ...)`` are on the CPU, which therefore knows how many images there are without asking.
    """
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        rows, *own = (send(values, images.device) for values in (rows, *(number[rows] for number in numbers)))
        images.index_copy_(0, rows, change(images[rows], *own))

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
from torch.utils.data import default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mim.data.pixels import EIGHT_BIT, Pixels
from mim.distributed.devices import send
from mim.errors import UserError
from mim.options.ranges import Count, Positive, Share, SomeShare, Whole, check_rising
from mim.randomness import RowGenerator

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SOLID = 1e-3  # how far the weight of measured pixels in a resized one may be from 1


class Views(nn.Module):
    """How many views of an image a method gets, and how they are made.

    A subclass writes :meth:`crop`; one that changes colours overrides :meth:`forward`, too. The size of a (global) view
    and the channel statistics are the encoder's: :meth:`configure` sets them before the first image.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    span: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.configure((224, 224), IMAGENET_MEAN, IMAGENET_STD, EIGHT_BIT)

    def configure(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], pixels: Pixels) -> None:
        """Sets height and width of a view, the scale of its numbers, and the statistics of what that makes of them.

        Args:
            size: of a (global) view.
            mean: per channel, of ``(v - low) / (high - low)``.
            std: as ``mean``.
            pixels: scale of the files.
        """
        self.size, self.pixels = size, pixels
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        ends = zip(pixels.low, pixels.high, strict=True)
        span = [math.log(high / low) if pixels.log else high - low for low, high in ends]
        self.register_buffer("low", torch.tensor(pixels.low)[:, None, None], persistent=False)
        self.register_buffer("span", torch.tensor(span)[:, None, None], persistent=False)
        # What stands in for nodata; plain numbers, as loader processes cannot read buffers that lie on a GPU.
        own_ends = zip(mean, *pixels.ends(len(mean)), strict=True)
        self.filling = [pixels.stored(share, low, high) for share, low, high in own_ends]

    def check(self, patch_size: tuple[int, int]) -> None:
        """Refuses views, other than those of the encoder's own size, that patches of this height and width cannot tile.

        Raises:
            UserError: that names the option to change.
        """

    def crop(self, image: Tensor) -> list[Tensor]:
        """Cuts ``(C, H, W)`` into ``V`` views ``(C, H_v, W_v)`` of its type; draws from torch's global generator."""
        raise NotImplementedError

    def center(self, image: Tensor) -> Tensor:
        """The middle of ``(C, H, W)`` at view size, of its type, for probes and pictures: nothing random."""
        return self._middle(image, 1.0)

    def _middle(self, image: Tensor, share: float) -> Tensor:
        """The middle ``share`` of the shorter side."""
        height, width = self.size
        scale = max(height / image.shape[-2], width / image.shape[-1]) / share
        full = [max(height, round(image.shape[-2] * scale)), max(width, round(image.shape[-1] * scale))]
        middle: Tensor = F.center_crop(resized(image, full, self.filling), [height, width])
        return middle

    def scale(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` of any type to floats on the scale of the data set; the mean where nothing was measured."""
        pixels = images.float()
        if self.pixels.log:
            pixels = torch.maximum(pixels, self.low).div(self.low).log()
        elif any(self.pixels.low):
            pixels = pixels - self.low
        # One number as such: a GPU multiplies by its inverse, and results of older runs depend on that.
        one = len(self.pixels.low) == 1 and not self.pixels.log
        pixels = pixels.div(self.pixels.high[0] - self.pixels.low[0] if one else self.span)
        pixels = pixels.clamp(0, 1) if self.pixels.clip else pixels
        if images.is_floating_point():
            pixels = torch.where(pixels.isnan(), self.mean[:, None, None], pixels)
        return pixels

    def normalize(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` to floats with the configured mean and deviation; 0 where nothing was measured."""
        return normalize(self.scale(images), self.mean, self.std)

    def forward(self, views: list[Tensor], generator: RowGenerator) -> list[Tensor]:
        """Batches of views to what the model takes, on the device the batches are on.

        Args:
            views: ``V x (B, C, H_v, W_v)`` of the data set's type.
            generator: random numbers of each image, on the CPU: what is decided there never waits for a GPU.
        """
        return [self.normalize(view) for view in views]


class RandomWindow:
    """A random part of an image, resized and perhaps mirrored: what torchvision's two transforms do, without their way.

    Args:
        size: height and width of the result.
        area: smallest and largest share of the image's area.
        ratio: narrowest and widest aspect.
        flip: probability of a horizontal flip.
    """

    def __init__(
        self, size: tuple[int, int], area: tuple[float, float], ratio: tuple[float, float], flip: float
    ) -> None:
        self.size, self.flip = list(size), flip
        self.draw = v2.RandomResizedCrop(size, area, ratio).make_params

    def __call__(self, image: Tensor, filling: Sequence[float]) -> Tensor:
        """``(C, H, W)`` of the image's type; draws from torch's global generator."""
        at = self.draw([image])
        part = image[:, at["top"] : at["top"] + at["height"], at["left"] : at["left"] + at["width"]]
        part = resized(part, self.size, filling)
        return part.flip(-1) if float(torch.rand(1)) < self.flip else part


def stacked(images: Sequence[Tensor]) -> Tensor:
    """``(B, C, H, W)`` of images of one type; of several types, as where only some lack pixels, in float32."""
    same = len({image.dtype for image in images}) == 1
    return default_collate(list(images) if same else [image.float() for image in images])  # type: ignore[no-any-return]


def resized(
    image: Tensor,
    size: Sequence[int],
    filling: Sequence[float],
    mode: v2.InterpolationMode = v2.InterpolationMode.BICUBIC,
) -> Tensor:
    """An image of any type resized within that type: rounded where it is whole numbers, never beyond their ends.

    Args:
        image: ``(C, H, W)`` uint8, uint16, int16 or float32, with NaN where nothing was measured.
        size: height and width.
        filling: number per channel that stands in for NaN meanwhile.
        mode: of interpolation; antialiased.

    Returns:
        ``(C, *size)`` of the same type. NaN wherever a pixel without measurement has had a say.
    """
    if image.dtype == torch.uint8 or list(image.shape[1:]) == list(size):
        same: Tensor = F.resize_image(image, list(size), interpolation=mode, antialias=True)
        return same
    pixels = image.float()
    missing = pixels[:1].isnan() if image.is_floating_point() else None
    if missing is not None and bool(missing.any()):
        filled = torch.where(missing, torch.tensor(filling)[:, None, None], pixels)
        weights = F.resize_image((~missing).float(), list(size), interpolation=mode, antialias=True)
        numbers: Tensor = F.resize_image(filled, list(size), interpolation=mode, antialias=True)
        return torch.where((weights - 1).abs() < _SOLID, numbers, torch.nan)
    numbers = F.resize_image(pixels, list(size), interpolation=mode, antialias=True)
    if image.is_floating_point():
        return numbers
    ends = torch.iinfo(image.dtype)
    return numbers.clamp_(ends.min, ends.max).round_().to(image.dtype)


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
        self.area, self.ratio, self.flip = scale, ratio, flip
        super().__init__()

    def configure(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], pixels: Pixels) -> None:
        """See :meth:`Views.configure`."""
        super().configure(size, mean, std, pixels)
        self.window = RandomWindow(size, self.area, self.ratio, self.flip)

    def crop(self, image: Tensor) -> list[Tensor]:
        """One crop ``(C, H, W)`` of the image's type."""
        return [self.window(image, self.filling)]


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

    def configure(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], pixels: Pixels) -> None:
        """See :meth:`Views.configure`."""
        super().configure(size, mean, std, pixels)
        ratio = (3 / 4, 4 / 3)
        self.large_window = RandomWindow(size, self.global_scale, ratio, self.flip)
        self.small_window = RandomWindow((self.local_size, self.local_size), self.local_scale, ratio, self.flip)

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
        """Two global crops ``(C, H, W)`` and the small ones, all of the image's type."""
        windows = [self.large_window] * 2 + [self.small_window] * self.local_crops
        return [window(image, self.filling) for window in windows]

    def forward(self, views: list[Tensor], generator: RowGenerator) -> list[Tensor]:
        """See :meth:`Views.forward`."""
        chances = [(1.0, 0.0), (0.1, 0.2)] + [(0.5, 0.0)] * self.local_crops  # of blur and of solarisation
        return [
            self._finished(
                view, normalize(self._recolour(self.scale(view), generator.rand(13), *chance), self.mean, self.std)
            )
            for view, chance in zip(views, chances, strict=True)
        ]

    def _finished(self, view: Tensor, images: Tensor) -> Tensor:
        """``images`` with 0 where the ``view`` that they are made of was not measured, whatever became of it since."""
        return torch.where(view.isnan(), 0.0, images) if view.is_floating_point() else images

    def _recolour(self, images: Tensor, numbers: Tensor, blur: float, solarised: float) -> Tensor:
        """Changes ``(B, C, H, W)`` in place, by ``numbers (B, 13)`` uniform on [0, 1)."""
        jittered, grey, blurred, inverted = (numbers[:, :4] < torch.tensor([0.8, 0.2, blur, solarised])).unbind(1)
        colours = images.shape[1] == 3 and self.pixels.colours
        adjustments = _COLOURS[: 4 if colours else 2] if self.pixels.bounded else _MEASUREMENTS
        _jitter(images, jittered, numbers[:, 4:8], numbers[:, 8:12].argsort(dim=1), adjustments)
        if colours:
            _change(images, grey, lambda chosen: rgb_to_grayscale(chosen).expand(-1, 3, -1, -1))
        low, high = self.blur
        reach = min(math.ceil(3 * high), min(images.shape[2:]) - 1)  # of the kernel; less than the image, as it mirrors
        deviations = (low + (high - low) * numbers[:, 12:]).expand(-1, 2)
        # Deviations stay on the CPU: kornia looks at them, and would wait for a GPU.
        _change(images, blurred, lambda chosen: gaussian_blur2d(chosen, 2 * reach + 1, deviations[blurred]))
        if self.pixels.eight_bit:  # turning measurements upside down makes no sense
            _change(images, inverted, solarize)
        return images


_STRENGTHS = (0.4, 0.4, 0.2, 0.1)  # of brightness, contrast, saturation and hue
_COLOURS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda pixels, shift: adjust_brightness_accumulative(pixels, 1 + shift),
    lambda pixels, shift: adjust_contrast_with_mean_subtraction(pixels, 1 + shift),
    lambda pixels, shift: adjust_saturation_with_gray_subtraction(pixels, 1 + shift),
    lambda pixels, shift: adjust_hue(pixels, shift * (2 * math.pi)),
)
# The first two without their limits of 0 and 1, beyond which measurements may lie.
_MEASUREMENTS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda pixels, shift: pixels * (1 + shift).view(-1, 1, 1, 1),
    lambda pixels, shift: pixels + (pixels - pixels.mean(dim=(1, 2, 3), keepdim=True)) * shift.view(-1, 1, 1, 1),
)


def _jitter(
    images: Tensor,
    chosen: Tensor,
    numbers: Tensor,
    order: Tensor,
    adjustments: Sequence[Callable[[Tensor, Tensor], Tensor]] = _COLOURS,
) -> None:
    """The colour jitter of torchvision, in place; every image has its own factors and its own order.

    Args:
        images: ``(B, C, H, W)``.
        chosen: ``(B,)`` bool, which images.
        numbers: ``(B, 4)`` uniform on [0, 1): from weakest to strongest.
        order: ``(B, 4)``: which adjustment comes first, second, third and last.
        adjustments: of brightness, contrast, saturation and hue, the first of them.
    """
    shifts = (2 * numbers - 1) * torch.tensor(_STRENGTHS)
    for place in order.unbind(1):
        for number, adjust in enumerate(adjustments):
            _change(images, chosen & (place == number), adjust, shifts[:, number])


def _change(images: Tensor, chosen: Tensor, change: Callable[..., Tensor], *numbers: Tensor) -> None:
    """Puts ``change(images, *numbers)`` in the place of the ``chosen (B,)`` images; the rest costs nothing.

    ``chosen`` and ``numbers (B, ...)`` are on the CPU, which therefore knows how many images there are without asking.
    """
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        rows, *own = (send(values, images.device) for values in (rows, *(number[rows] for number in numbers)))
        images.index_copy_(0, rows, change(images[rows], *own))

"""From a decoded image to what a method sees: crops in the loader's workers, the batched rest on the model's device.

The division is measured: a worker that crops uint8 tensors and ships uint8 is the cheapest part of the pipeline, while
colour, blur and normalisation cost least as one batched operation beside the model.
"""

from collections.abc import Sequence

import torch
from kornia.enhance import normalize
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

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

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """Batches of uint8 views to what the model takes, on the device the batches are on."""
        return [self.normalize(view) for view in views]


class SingleView(Views):
    """One random resized crop and a flip: all the augmentation that MAE and HPM want (arXiv:2111.06377, table 8).

    Args:
        scale: smallest and largest share of the image's area in a crop.
        ratio: narrowest and widest aspect of a crop.
        flip: probability of a horizontal flip; 0 where left and right mean something.
    """

    def __init__(
        self, scale: tuple[float, float] = (0.2, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3), flip: float = 0.5
    ) -> None:
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

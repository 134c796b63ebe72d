"""Augmentation for training with labels: timm's RandAugment and random erasing on top of random crops."""

import torch
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from mim.data.labelled import Frames
from mim.errors import UserError
from mim.randomness import keyed_libraries


class Augmented(Frames):
    """Random crops, flipped, recoloured and partly erased.

    Args:
        crop_pct: of the middle that is scored; see ``Frames``.
        scale: smallest and largest share of the image's area in a crop.
        auto_augment: timm's name of a RandAugment policy, or ``none``.
        erase: probability that a rectangle becomes noise with the statistics of the images.
    """

    def __init__(self, crop_pct: float, scale: tuple[float, float], auto_augment: str, erase: float) -> None:
        super().__init__(crop_pct, scale)
        self.policy = None
        if auto_augment != "none":
            try:
                self.policy = rand_augment_transform(
                    auto_augment, {"translate_const": 100, "img_mean": (124, 116, 104)}
                )
            except (AssertionError, ValueError) as error:
                hint = "--auto_augment rand-m9-mstd0.5-inc1   or   --auto_augment none"
                raise UserError(f"--auto_augment {auto_augment} is no policy of timm", hint=hint) from error
            for op in self.policy.ops:
                if op.name == "PosterizeIncreasing":
                    op.level_fn = _posterize_bits
        # Applied to a picture of ones, it tells where to put noise; on bytes it could not draw the noise itself.
        self.erasing = v2.RandomErasing(erase, scale=(0.02, 1 / 3), ratio=(0.3, 3.3), value=0)

    def crop(self, image: Tensor) -> list[Tensor]:
        """One crop ``(C, H, W)`` of the image's type; draws from torch's global generator."""
        (view,) = super().crop(image)
        if self.policy is not None:
            if len(view) != 3 or view.dtype != torch.uint8 or not self.pixels.colours:
                kind = str(view.dtype).removeprefix("torch.")
                raise UserError(
                    f"--auto_augment needs RGB images of 8 bit, not {len(view)} channels of {kind}",
                    hint="--auto_augment none",
                )
            with keyed_libraries(int(torch.randint(1 << 62, ()))):  # timm draws from Python's and NumPy's generators
                view = pil_to_tensor(self.policy(to_pil_image(view)))
        kept = self.erasing(torch.ones(1, *view.shape[1:])).bool()
        if not kept.all():
            noise = torch.randn(view.shape) * self.std[:, None, None] + self.mean[:, None, None]
            view = torch.where(kept, view, self._in_files(noise).to(view.dtype))
        return [view]

    def _in_files(self, noise: Tensor) -> Tensor:
        """Numbers ``(C, H, W)`` as a file of the data set would hold them, within their type."""
        low, high = (torch.tensor(end)[:, None, None] for end in self.pixels.ends(len(noise)))
        numbers = self.pixels.stored(noise, low, high)
        bounds = {"uint8": (0, 255), "per_file": (0, 255), "uint16": (0, 65535), "int16": (-32768, 32767)}
        least, most = bounds.get(self.pixels.type, (None, None))
        return numbers if least is None else torch.clamp(numbers, least, most)


def _posterize_bits(level: float, hparams: object) -> tuple[int]:
    """Bits that posterising keeps: as in timm, but never 0, which Pillow refuses and the strongest level asks for."""
    return (max(1, 4 - int(level / 10 * 4)),)

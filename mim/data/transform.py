"""From one picture to what a trained encoder takes."""

from dataclasses import dataclass

from torch import Tensor

from mim.data.images import read_picture
from mim.data.labelled import Frames


@dataclass(frozen=True)
class Transform:
    """Cuts the middle of a picture and normalises it, as evaluations do.

    Args:
        frames: size, middle and statistics.
        channels: of the encoder.
    """

    frames: Frames
    channels: int

    def __call__(self, image: object) -> Tensor:
        """``(C, H, W)`` float32 from one picture.

        Args:
            image: an image of PIL, a path, a tensor ``(C, H, W)`` or an array ``(H, W, C)``, of any size; uint8, or
                numbers of the type that the encoder was trained on.

        Raises:
            ImageError: for a file that cannot be read.
            NoPictureError: for what is no picture.
        """
        middle = self.frames.center(read_picture(image, self.channels, pixels=self.frames.pixels))
        return self.frames.normalize(middle[None])[0]

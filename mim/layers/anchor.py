"""What keeps an encoder near the weights that it started from, so that it does not forget while it goes on learning."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AnchorConfig:
    """Terms of the loss, each with its weight; none of them unless asked for.

    The last two look at all patches of the image, student and frozen start alike: about two more forward passes.

    Args:
        weights: half the squared distance of the encoder's weights from the start's.
        gram: how far the similarities of an image's patches are from those in the start (gram anchoring of DINOv3,
            arXiv:2508.10104).
        features: one minus the cosine of each patch's features with the start's.
    """

    weights: float = 0.0
    gram: float = 0.0
    features: float = 0.0

    def __post_init__(self) -> None:
        """Refuses to push away."""
        if not all(0 <= weight < 1e9 for weight in (self.weights, self.gram, self.features)):
            raise ValueError(f"an anchor has weights from 0 to 1e9, not {self.weights}, {self.gram}, {self.features}")

    @property
    def holds(self) -> bool:
        """Whether there is any term."""
        return max(self.weights, self.gram, self.features) > 0

    @property
    def looks(self) -> bool:
        """Whether features are compared, for which both have to look at the images."""
        return max(self.gram, self.features) > 0


def weight_distance(weights: Iterable[Tensor], start: Iterable[Tensor]) -> Tensor:
    """Half the sum of squared differences of weights that still learn; a scalar."""
    pairs = [(own.float() - other.float()).square().sum() for own, other in zip(weights, start, strict=True)]
    return 0.5 * torch.stack(pairs).sum()


def gram_distance(features: Tensor, start: Tensor) -> Tensor:
    """Mean squared difference of all cosines between patches of an image: two ``(B, N, D)`` to a scalar."""
    with torch.autocast(features.device.type, enabled=False):  # half precision would round small differences away
        own, other = (F.normalize(patches.float(), dim=-1) for patches in (features, start))
        return F.mse_loss(own @ own.transpose(1, 2), other @ other.transpose(1, 2))


def feature_distance(features: Tensor, start: Tensor) -> Tensor:
    """Mean of one minus the cosine of every patch: two ``(B, N, D)`` to a scalar."""
    return 1 - F.cosine_similarity(features.float(), start.float(), dim=-1).mean()

"""What a decoder has to predict for hidden patches: pixels, edges, ids of codes, what another network makes of them."""

from mim.targets.base import Target
from mim.targets.features import FeatureTarget
from mim.targets.hog import HOGTarget
from mim.targets.joint import JointTarget
from mim.targets.pixels import PixelTarget
from mim.targets.tokens import TokenTarget

__all__ = ["FeatureTarget", "HOGTarget", "JointTarget", "PixelTarget", "Target", "TokenTarget"]

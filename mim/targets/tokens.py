"""Ids of a frozen tokenizer as targets (BEiT, arXiv:2106.08254)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.encoder import Encoder
from mim.errors import UserError
from mim.options.ranges import Positive, ShareBelowOne
from mim.patches import patchify
from mim.targets.base import Target, patch_size_of
from mim.tokenizers import load_tokenizer


class TokenTarget(Target):
    """The ids that a tokenizer gives the pixels of a patch, and cross-entropy.

    Args:
        tokenizer: file that ``tokens fit`` has written, or ``builtin``: 256 patches of 4 px. A patch must be as many
            pixels wide as a token, or a multiple. Its weights become part of the checkpoints.
        mean: per channel, that the run normalises images with; ImageNet's, as by default, unless ``data.mean`` is set.
        std: as ``mean``.
        smoothing: of the labels: the share of their weight that all codes have together.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tokenizer: str = "builtin",
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[Positive, ...] = (0.229, 0.224, 0.225),
        smoothing: ShareBelowOne = 0.0,
    ) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(tokenizer, "--model.init_args.target.init_args.tokenizer")
        self.smoothing = smoothing
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "TokenTarget":
        """Leaves the tokenizer in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def check(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """See :meth:`Target.check`."""
        given = torch.tensor([list(mean), list(std)])
        own = torch.stack([self.mean.flatten(), self.std.flatten()]).cpu()
        if given.shape == own.shape and torch.allclose(given, own):
            return
        texts = ["[" + ",".join(f"{number:.6g}" for number in numbers) + "]" for numbers in (mean, std)]
        option = "--model.init_args.target.init_args"
        raise UserError(
            "the tokenizer expects images that are normalised in another way than this run's",
            why=f"the run's mean is {texts[0]}, its deviation {texts[1]}",
            hint=f"{option}.mean {texts[0]} {option}.std {texts[1]}",
        )

    def tokens_per_patch(self, encoder: Encoder) -> int:
        """Tokens on one patch of ``encoder``.

        Raises:
            UserError: if patches are no multiple of tokens, or images are not RGB.
        """
        stride, (height, width) = self.tokenizer.stride, encoder.patch_size
        if encoder.in_chans != 3:
            raise UserError(
                f"tokens are of RGB images, the model takes {encoder.in_chans} channels", hint="--in_chans 3"
            )
        if height % stride or width % stride:
            raise UserError(
                f"patches of {height} x {width} pixels do not divide into tokens of {stride} x {stride}",
                hint=f"--patch_size {max(1, round(height / stride)) * stride}",
            )
        return (height // stride) * (width // stride)

    def dim(self, encoder: Encoder) -> int:
        """Codes times tokens per patch."""
        return self.tokens_per_patch(encoder) * self.tokenizer.codes

    @torch.no_grad()
    def ids(self, images: Tensor) -> Tensor:
        """Ids ``(B, h', w')`` of normalised images ``(B, 3, H, W)``; -1 for a token that is not finite."""
        return self.tokenizer.encode((images.float() * self.std + self.mean).clamp(0, 1))

    def pictured(self, ids: Tensor) -> Tensor:
        """Normalised images ``(B, 3, H, W)`` of ``ids (B, h', w')``, as the tokenizer draws them."""
        return (self.tokenizer.decode(ids) - self.mean) / self.std

    def mosaic(self, ids: Tensor) -> Tensor:
        """Normalised images ``(B, 3, H, W)`` of ``ids (B, h', w')``, each token by itself: pixels tell of no other."""
        return (self.tokenizer.mosaic(ids) - self.mean) / self.std

    @staticmethod
    def by_patch(ids: Tensor, grid: tuple[int, int]) -> Tensor:
        """Ids ``(B, h', w')`` sorted by patches of ``grid``: ``(B, N, s)``, row by row inside of a patch."""
        (rows, columns), (batch, height, width) = grid, ids.shape
        cut = ids.view(batch, rows, height // rows, columns, width // columns)
        return cut.transpose(2, 3).flatten(3).flatten(1, 2)

    @staticmethod
    def by_place(ids: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """The inverse of :meth:`by_patch`: ``(B, N, s)`` to ``(B, h', w')``; ``size`` counts tokens on a patch."""
        cut = ids.view(len(ids), *grid, *size)
        return cut.transpose(2, 3).reshape(len(ids), grid[0] * size[0], grid[1] * size[1])

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int], indices: Tensor, weights: Tensor | None = None) -> Tensor:
        """Ids ``(B, M, s)`` int64 of the patches ``indices``; see :meth:`Target.forward`."""
        ids = self.by_patch(self.ids(images), grid)
        return ids.gather(1, indices[..., None].expand(-1, -1, ids.shape[2]))

    def error(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross-entropy of logits ``(B, M, s * V)`` with ids ``(B, M, s)``, mean over a patch: ``(B, M)``.

        NaN where an id is -1: a step that does not know its target must not be taken.
        """
        logits = prediction.float().reshape(*target.shape, self.tokenizer.codes)  # (B, M, s, V)
        error = F.cross_entropy(
            logits.flatten(0, -2), target.flatten().clamp(min=0), reduction="none", label_smoothing=self.smoothing
        )
        error = error.view(target.shape).masked_fill(target < 0, torch.nan).mean(dim=-1)
        return error if weights is None else error * weights.amax(dim=-1)

    def to_pixels(self, prediction: Tensor, images: Tensor, grid: tuple[int, int], indices: Tensor) -> Tensor:
        """Pixels ``(B, M, p*p*3)`` of the likeliest codes, each by itself."""
        ids = prediction.reshape(*prediction.shape[:2], -1, self.tokenizer.codes).argmax(-1)  # (B, M, s)
        height, width = (side // self.tokenizer.stride for side in patch_size_of(images, grid))
        drawn = self.mosaic(ids.reshape(-1, height, width))
        return patchify(drawn, patch_size_of(images, grid)).view(*ids.shape[:2], -1).to(images.dtype)

"""Heads that turn patch features into class maps: linear, k-NN, and UPerNet.

Every head takes features of some blocks, each ``(B, D, h, w)``, and gives logits ``(B, classes, h', w')``; the caller
resizes them. In training a head may give further logits, which only enter the loss with its ``weights``.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from mim.evaluation.knn import nearest


class LinearHead(nn.Module):
    """One linear map of each patch (iBOT, arXiv:2111.07832): features put end to end, then a 1x1 convolution.

    Args:
        dim: width ``D`` of a feature.
        taps: number of features.
        classes: number of classes.
        batch_norm: normalise the features first, as DINOv2 does; iBOT does not.
    """

    weights = (1.0,)

    def __init__(self, dim: int, taps: int, classes: int, batch_norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim * taps) if batch_norm else nn.Identity()
        self.classify = _classifier(dim * taps, classes)

    def forward(self, taps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``(B, classes, h, w)`` logits."""
        return (self.classify(self.norm(torch.cat(list(taps), dim=1))),)


class KNNHead(nn.Module):
    """Weighted votes of the most similar labelled patches, without training.

    Args:
        bank: ``(M, D)`` features of labelled patches.
        labels: ``(M,)`` the class of most of each patch's pixels.
        classes: number of classes.
        k: patches that vote.
        temperature: of the votes ``exp(cosine / temperature)``.
    """

    weights = (1.0,)
    bank: Tensor
    labels: Tensor

    def __init__(self, bank: Tensor, labels: Tensor, classes: int, k: int = 20, temperature: float = 0.07) -> None:
        super().__init__()
        self.register_buffer("bank", bank)
        self.register_buffer("labels", labels)
        self.classes, self.k, self.temperature = classes, k, temperature

    def forward(self, taps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``(B, classes, h, w)``: each class's share of the votes."""
        features = torch.cat(list(taps), dim=1).permute(0, 2, 3, 1)  # (B, h, w, D)
        similarity, answers = nearest(self.bank, self.labels, features.flatten(0, 2), self.k)
        weights = (similarity / self.temperature).softmax(1)
        votes = weights.new_zeros(len(weights), self.classes).scatter_add_(1, answers, weights)
        return (votes.view(*features.shape[:3], -1).permute(0, 3, 1, 2),)


class SavedHead(NamedTuple):
    """A head that was fine-tuned with the encoder in the folder where it lies.

    Args:
        head: in evaluation mode; see this module for what it takes and gives.
        taps: blocks whose features it reads, from 0: ``dense`` of :meth:`mim.encoder.Encoder.after_blocks`.
        classes: names, in the order of its logits.
    """

    head: nn.Module
    taps: list[int]
    classes: list[str]


def load_head(file: Path) -> SavedHead:
    """The head that ``segment.py --finetune true`` has left, usually ``RESULT/export/head.safetensors``.

    Raises:
        ValueError: if the file does not say what head it holds, as those of version 0.1.
    """
    with safe_open(file, "pt") as opened:
        facts = opened.metadata() or {}
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    if "head" not in facts:
        raise ValueError(f"{file} does not say what head it holds; fine-tune again to have it written")
    dim, taps, classes = (json.loads(facts[name]) for name in ("dim", "taps", "classes"))
    if facts["head"] == "upernet":
        head: nn.Module = UPerHead(dim, len(classes))
    else:
        head = LinearHead(dim, len(taps), len(classes), json.loads(facts["batch_norm"]))
    head.load_state_dict(state)
    return SavedHead(head.eval(), taps, classes)


def patch_labels(classes: Tensor, grid: tuple[int, int], count: int, ignore: int = -1) -> Tensor:
    """The class of most pixels of each patch, ``ignore`` where no pixel has one.

    Args:
        classes: ``(B, H, W)``, a multiple of ``grid``.
        grid: patches per side.
        count: number of classes.
        ignore: class of the pixels that do not count.

    Returns:
        ``(B, h, w)`` int64.
    """
    rows, columns = classes.shape[1] // grid[0], classes.shape[2] // grid[1]
    cells = classes.long().reshape(-1, grid[0], rows, grid[1], columns)
    cells = cells.permute(0, 1, 3, 2, 4).flatten(3)
    votes = torch.zeros(*cells.shape[:3], count + 1, dtype=torch.int64, device=classes.device)
    votes.scatter_add_(3, torch.where(cells == ignore, count, cells), torch.ones_like(cells))
    best = votes[..., :count].max(3)
    return torch.where(best.values > 0, best.indices, ignore)


class UPerHead(nn.Module):
    """UPerNet (arXiv:1807.10221) on a plain ViT, with BEiT's pyramid (arXiv:2106.08254) and an auxiliary FCN.

    Four features of one size become a pyramid of 4, 2, 1 and 1/2 times that size. The smallest is pooled at several
    scales; then information flows from coarse to fine, and all levels together are classified at the finest size.

    Args:
        dim: width ``D`` of a feature, and of the head.
        classes: number of classes.
        pool_scales: cells per side of the poolings.
        auxiliary: width of the FCN on the third feature; its loss has weight 0.4.
        dropout: of whole channels before the classifiers.
    """

    weights = (1.0, 0.4)

    def __init__(
        self,
        dim: int,
        classes: int,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        auxiliary: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        twice = nn.ConvTranspose2d(dim, dim, 2, 2)
        fourfold = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)
        )
        self.rescale = nn.ModuleList([fourfold, twice, nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)])
        self.pools = nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(s), _block(dim, dim, 1)) for s in pool_scales])
        self.pooled = _block(dim * (1 + len(pool_scales)), dim, 3)
        self.lateral = nn.ModuleList([_block(dim, dim, 1) for _ in range(3)])
        self.smooth = nn.ModuleList([_block(dim, dim, 3) for _ in range(3)])
        self.fuse = _block(4 * dim, dim, 3)
        self.classify = nn.Sequential(nn.Dropout2d(dropout), _classifier(dim, classes))
        self.auxiliary = nn.Sequential(
            _block(dim, auxiliary, 3), nn.Dropout2d(dropout), _classifier(auxiliary, classes)
        )

    def forward(self, taps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits ``(B, classes, 4h, 4w)``; in training also the auxiliary ``(B, classes, h, w)``."""
        levels = [scale(tap) for scale, tap in zip(self.rescale, taps, strict=True)]  # fine to coarse
        top = levels.pop()
        context = [top, *(_like(pool(top), top) for pool in self.pools)]
        path = [self.pooled(torch.cat(context, dim=1))]  # from here coarse to fine
        for lateral, level in zip(reversed(self.lateral), reversed(levels), strict=True):
            path.append(lateral(level) + _like(path[-1], level))
        fine = path[-1]
        smoothed = [smooth(level) for smooth, level in zip(self.smooth, path[1:], strict=True)]
        fused = self.fuse(torch.cat([_like(level, fine) for level in [path[0], *smoothed]], dim=1))
        answer: Tensor = self.classify(fused)
        return (answer, self.auxiliary(taps[2])) if self.training else (answer,)


def _block(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def _classifier(inputs: int, classes: int) -> nn.Conv2d:
    classifier = nn.Conv2d(inputs, classes, 1)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(cast(Tensor, classifier.bias))
    return classifier


def _like(level: Tensor, other: Tensor) -> Tensor:
    return F.interpolate(level, other.shape[2:], mode="bilinear")

"""Masking policies: which patches are hidden."""

from mim.masking.attention import AttentionMasking
from mim.masking.attention_keep import AttentionKeepMasking
from mim.masking.base import Masking
from mim.masking.block import BlockMasking
from mim.masking.boxes import BoxMasking
from mim.masking.cosine import CosineMasking
from mim.masking.grid import GridMasking
from mim.masking.hard_patch import HardPatchMasking
from mim.masking.multi_block import MultiBlockMasking
from mim.masking.rectangle import RectangleMasking
from mim.masking.sampled import SampledMasking
from mim.masking.truncated_normal import TruncatedNormalMasking
from mim.masking.uniform import RandomMasking, VaryingRandomMasking

__all__ = [
    "AttentionKeepMasking",
    "AttentionMasking",
    "BlockMasking",
    "BoxMasking",
    "CosineMasking",
    "GridMasking",
    "HardPatchMasking",
    "Masking",
    "MultiBlockMasking",
    "RandomMasking",
    "RectangleMasking",
    "SampledMasking",
    "TruncatedNormalMasking",
    "VaryingRandomMasking",
]

"""Masking policies: which patches are hidden."""

from mim.masking.base import Masking
from mim.masking.block import BlockMasking
from mim.masking.hard_patch import HardPatchMasking
from mim.masking.uniform import RandomMasking

__all__ = ["BlockMasking", "HardPatchMasking", "Masking", "RandomMasking"]

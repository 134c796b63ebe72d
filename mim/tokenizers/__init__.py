"""Tokenizers: images as grids of integers out of a codebook, and back."""

from mim.tokenizers.base import Tokenizer
from mim.tokenizers.codebook import Codebook
from mim.tokenizers.convolutional import ConvTokenizer
from mim.tokenizers.files import load_tokenizer, save_tokenizer
from mim.tokenizers.patches import PatchTokenizer
from mim.tokenizers.vqgan import VQGANTokenizer

__all__ = [
    "Codebook",
    "ConvTokenizer",
    "PatchTokenizer",
    "Tokenizer",
    "VQGANTokenizer",
    "load_tokenizer",
    "save_tokenizer",
]

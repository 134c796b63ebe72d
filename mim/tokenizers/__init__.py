"""Tokenizers: images as grids of integers out of a codebook, and back."""

from mim.tokenizers.base import Tokenizer
from mim.tokenizers.codebook import Codebook
from mim.tokenizers.convolutional import ConvTokenizer
from mim.tokenizers.files import load_tokenizer, save_tokenizer
from mim.tokenizers.patches import PatchTokenizer

__all__ = ["Codebook", "ConvTokenizer", "PatchTokenizer", "Tokenizer", "load_tokenizer", "save_tokenizer"]

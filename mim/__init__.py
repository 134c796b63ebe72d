"""Masked image modeling for timm Vision Transformers."""

__version__ = "0.1.0"

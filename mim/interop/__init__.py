"""Weights of other programs, in and out: safe reading, layouts, fitting, the timm folder."""

from mim.interop.fit import adapt, likely_model
from mim.interop.layouts import named_tensors, to_timm
from mim.interop.reading import load_weights
from mim.interop.timm_folder import ModelCard, export_backbone

__all__ = ["ModelCard", "adapt", "export_backbone", "likely_model", "load_weights", "named_tensors", "to_timm"]

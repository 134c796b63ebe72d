"""Weights of other programs, in and out: safe reading, layouts, fitting, the timm folder."""

from mim.interop.fit import adapt, likely_model
from mim.interop.layouts import named_tensors, to_timm
from mim.interop.reading import check_timm_folder, load_weights, refuse_compressed, scale_of, weights_in
from mim.interop.timm_folder import ModelCard, export_backbone

__all__ = [
    "ModelCard",
    "adapt",
    "check_timm_folder",
    "export_backbone",
    "likely_model",
    "load_weights",
    "named_tensors",
    "refuse_compressed",
    "scale_of",
    "to_timm",
    "weights_in",
]

"""Weights of other programs, in and out: safe reading, layouts, fitting, the timm folder."""

from mim.interop.built import Built, built, built_otherwise, refuse_otherwise
from mim.interop.conv_nets import conv_net_in
from mim.interop.fit import adapt, arguments_of, differences, likely_model
from mim.interop.hf_folder import hf_folder
from mim.interop.layouts import named_tensors, to_timm
from mim.interop.misfit import misfit
from mim.interop.reading import (
    add_checksums,
    check_timm_folder,
    load_weights,
    read_vit,
    refuse_compressed,
    scale_of,
    weights_in,
)
from mim.interop.rotary import likely_rotary, to_rotary
from mim.interop.sharded import deepspeed_weights
from mim.interop.timm_folder import ModelCard, export_backbone

__all__ = [
    "Built",
    "ModelCard",
    "adapt",
    "add_checksums",
    "arguments_of",
    "built",
    "built_otherwise",
    "check_timm_folder",
    "conv_net_in",
    "deepspeed_weights",
    "differences",
    "export_backbone",
    "hf_folder",
    "likely_model",
    "likely_rotary",
    "load_weights",
    "misfit",
    "named_tensors",
    "read_vit",
    "refuse_compressed",
    "refuse_otherwise",
    "scale_of",
    "to_rotary",
    "to_timm",
    "weights_in",
]

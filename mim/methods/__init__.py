"""The methods, one file each."""

from mim.methods.base import Batch, Method, NonFiniteError, OptimConfig, Plan
from mim.methods.hpm import HPM
from mim.methods.ibot import IBOT
from mim.methods.mae import MAE

__all__ = ["HPM", "IBOT", "MAE", "Batch", "Method", "NonFiniteError", "OptimConfig", "Plan"]

"""The methods, one file each."""

from mim.methods.base import Batch, Method, NonFiniteError, OptimConfig, Plan
from mim.methods.hpm import HPM
from mim.methods.mae import MAE

__all__ = ["HPM", "MAE", "Batch", "Method", "NonFiniteError", "OptimConfig", "Plan"]

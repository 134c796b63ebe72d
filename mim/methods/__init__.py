"""The methods, one file each."""

from mim.methods.base import Batch, Method, NonFiniteError, OptimConfig, Plan
from mim.methods.mae import MAE

__all__ = ["MAE", "Batch", "Method", "NonFiniteError", "OptimConfig", "Plan"]

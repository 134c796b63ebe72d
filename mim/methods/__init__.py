"""The methods, one file each."""

from mim.methods.base import Batch, Method, NonFiniteError, OptimConfig, Plan
from mim.methods.hpm import HPM
from mim.methods.ibot import IBOT
from mim.methods.mae import MAE
from mim.methods.momentum_mae import MomentumMAE

__all__ = ["HPM", "IBOT", "MAE", "Batch", "Method", "MomentumMAE", "NonFiniteError", "OptimConfig", "Plan"]

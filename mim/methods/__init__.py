"""The methods, one file each."""

from mim.methods.adamae import AdaMAE
from mim.methods.base import Batch, Method, NonFiniteError, OptimConfig, Plan
from mim.methods.capi import CAPI
from mim.methods.dtm import DTM
from mim.methods.hpm import HPM
from mim.methods.ibot import IBOT
from mim.methods.ijepa import IJEPA
from mim.methods.mae import MAE
from mim.methods.maskgit import MaskGIT
from mim.methods.momentum_mae import MomentumMAE
from mim.methods.mp3 import MP3
from mim.methods.seit import SeiT
from mim.methods.simmim import SimMIM
from mim.methods.spark import SparK
from mim.methods.tokenunify import TokenUnify

__all__ = [
    "CAPI",
    "DTM",
    "HPM",
    "IBOT",
    "IJEPA",
    "MAE",
    "MP3",
    "AdaMAE",
    "Batch",
    "MaskGIT",
    "Method",
    "MomentumMAE",
    "NonFiniteError",
    "OptimConfig",
    "Plan",
    "SeiT",
    "SimMIM",
    "SparK",
    "TokenUnify",
]

"""What happens beside the training step: checkpoints, metrics, probes and pictures."""

from mim.callbacks.checkpoints import Checkpoints, Signals
from mim.callbacks.evaluation import Evaluation
from mim.callbacks.nan_dump import NaNDump
from mim.callbacks.profile import FIRST, Profile
from mim.callbacks.run_log import RunLog

__all__ = ["FIRST", "Checkpoints", "Evaluation", "NaNDump", "Profile", "RunLog", "Signals"]

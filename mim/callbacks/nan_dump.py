"""What a step that gave NaN leaves behind, so that it can be repeated."""

from dataclasses import asdict

import torch
from lightning import Callback, LightningModule, Trainer

from mim.data.pretrain import PretrainData
from mim.distributed.sharding import whole
from mim.methods import Method, NonFiniteError
from mim.run.folder import RunFolder


class NaNDump(Callback):
    """Keeps the images of a step that was not finite, and the weights, teacher and centres before it.

    With the method of ``config.yaml`` they give the step's loss again, bit for bit on the same machine. Written while
    all processes still talk to each other: weights may be sharded, and the first to leave would take the others along.

    Args:
        run: the run's folder.
        data: opened.
    """

    def __init__(self, run: RunFolder, data: PretrainData) -> None:
        self.run, self.data = run, data

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the dump if that is what happened; all processes end at the same step."""
        if not isinstance(exception, NonFiniteError):
            return
        assert isinstance(pl_module, Method)
        weights = whole(pl_module.state_dict(), keep=trainer.is_global_zero)
        try:
            if trainer.is_global_zero:
                exception.names = self._write(trainer, pl_module, exception.step, weights)
        finally:
            trainer.strategy.barrier()

    def _write(self, trainer: Trainer, method: Method, step: int, weights: dict[str, torch.Tensor]) -> list[str]:
        views, labels, names, valid = self.data.batch(step)
        dump = self.run.nan_dump(step)
        state = {"step": step, "plan": asdict(method.plan), "views": views, "labels": labels, "names": names}
        state |= {"valid": valid[0]} if valid else {}  # which pixels were measured
        state |= {"accumulate": trainer.accumulate_grad_batches, "processes": trainer.world_size}
        try:
            self.run.debug.mkdir(exist_ok=True)
            torch.save(state | {"state_dict": weights}, dump)
        except (OSError, RuntimeError):  # as torch tells of a full disk; that the step was not finite matters more
            dump.unlink(missing_ok=True)
        return names

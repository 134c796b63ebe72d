"""Weights, gradients and optimizer state spread over the processes of a run: FSDP2 (arXiv:2304.11277), simplest form.

A method is one group: its weights are gathered for a training step and given back after it, so that between steps a
process holds its share of weights and optimizer state alone. Checkpoints are one whole file, as those of any other run.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes; what it saves can be resumed by any strategy and any number of processes."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Takes all processes for the data; none shares the work on one image."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All weights, whole, in the first process; a collective."""
        assert self.lightning_module is not None
        state: dict[str, Any] = whole(self.lightning_module.state_dict(), keep=self.is_global_zero)
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, whole, in the first process; a collective."""
        state: dict[str, Any] = whole(optimizer.state_dict(), keep=self.is_global_zero)
        return state

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = True) -> dict[str, Any]:
        """Reads the file in every process, with the checks that any other run makes."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Every process takes its share of the weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        shares = {name: _share(value, own[name]) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(shares, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Every process takes its share of the state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            shares = {
                number: {name: _share(value, parameters[number]) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict(dict(state) | {"state": shares})

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether :meth:`load_optimizer_state_dict` is asked; Lightning's own loads it together with the weights."""
        return True


def shard(method: LightningModule, mesh: DeviceMesh | None) -> None:
    """Spreads a method over the processes of ``mesh``, once; without a mesh it stays as it is."""
    if mesh is None or isinstance(method, FSDPModule):
        return
    fully_shard(method, mesh=mesh["data_parallel"])
    register_fsdp_forward_method(method, "training_step")


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights of a sharded module: a collective. Any other module is left alone."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def whole(tree: Any, keep: bool = True) -> Any:  # noqa: ANN401 - state dicts are such trees
    """A nested state with every sharded tensor gathered, one after the other: a collective.

    Args:
        tree: dicts and lists of tensors and plain values; on the CPU afterwards.
        keep: whether this process wants the result; it takes part anyway and gets an empty dict if not.
    """
    gathered = _gather(tree, keep)
    return gathered if keep else {}


def local(value: Tensor) -> Tensor:
    """This process's share of a sharded tensor; any other as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def total(value: Tensor) -> Tensor:
    """A sharded tensor as all processes hold it together; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _gather(tree: Any, keep: bool) -> Any:  # noqa: ANN401
    if isinstance(tree, Mapping):
        return {key: _gather(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_gather(value, keep) for value in tree]
    if not isinstance(tree, Tensor):
        return tree
    value = total(tree.detach())
    return value.cpu() if keep else None


def _share(value: Any, like: Tensor) -> Any:  # noqa: ANN401
    """The part of ``value`` that this process holds of ``like``; what is no tensor of that shape stays whole."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

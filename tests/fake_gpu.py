"""A GPU that is not there: its tensors have shapes, types and a device, and no values; those of the CPU are real.

Whatever would make the CPU wait for the device raises: ``item``, ``bool``, ``tolist``, ``nonzero``, a boolean index, a
copy to the CPU. So does an operation on tensors of both, and a copy to the device that is not asynchronous.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mim.data.crops import collate
from mim.data.pixels import EIGHT_BIT
from mim.data.pretrain import PretrainData
from mim.methods import Batch, Method
from mim.randomness import RowGenerator

CUDA, META = torch.device("cuda", 0), torch.device("meta")
"""The device of a run, for everything but the backward pass, which torch can follow on the other alone."""

COPIES = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}
"""What moves tensors between devices, and which argument is the source."""

INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
"""What counts the places of a boolean index, and fetches an index that lies elsewhere; torch's shapes know neither."""

STAGED = 1 << 16
"""Bytes that CUDA copies aside before it goes on, so that an asynchronous copy of so few needs no pinned memory."""


class HostWaitError(AssertionError):
    """The CPU would wait for the device."""


class Machine(TorchDispatchMode):
    """A CPU, and a device without values.

    Args:
        device: of the tensors without values.

    Attributes:
        calls: operations on the device, by name, each with the type of the first floating numbers that it was given.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.fake = device, FakeTensorMode(allow_non_fake_inputs=True)
        self.calls: list[tuple[str, torch.dtype | None]] = []
        self._pinned: dict[int, Tensor] = {}

    def pin(self, values: Tensor) -> Tensor:
        """The same tensor, from now on in memory that a device can read while the CPU goes on."""
        if values.device.type != "cpu":
            raise RuntimeError("only tensors of the CPU can be pinned")
        self._pinned[values.untyped_storage().data_ptr()] = values
        return values

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        devices = [leaf.type for leaf in leaves if isinstance(leaf, torch.device)]
        if self.device.type not in devices and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **kwargs)
        numbers = (leaf.dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
        self.calls.append((str(func), next(numbers, None)))
        with self.fake:
            result = func(*args, **kwargs)
        if func in COPIES:
            asynchronous = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            self._check_copy(args[COPIES[func]], result, asynchronous)
        if func in INDEXED:
            _check_index(args[0], [index for index in args[1] if index is not None])
        return result

    def _check_copy(self, source: Tensor, result: Tensor, asynchronous: bool) -> None:
        if result.device.type == "cpu" and source.device.type != "cpu":
            raise HostWaitError("a tensor of the device was copied to the CPU")
        # On meta nothing tells pinned from ordinary memory, so the other device is what this is asked of.
        moved = result.device.type == "cuda" and source.device.type == "cpu" and source.dim() > 0
        if not moved or (asynchronous and source.nbytes <= STAGED):
            return
        if not (asynchronous and source.untyped_storage().data_ptr() in self._pinned):
            raise HostWaitError(f"a tensor {tuple(source.shape)} of the CPU was copied to the device while it waited")


def _check_index(values: Tensor, indices: list[Tensor]) -> None:
    if any(index.dtype == torch.bool for index in indices):
        raise HostWaitError("a boolean index: its places are counted first")
    if any(index.device != values.device for index in indices):
        raise HostWaitError("an index of another device")


def _no_autocast(*_: object, **__: object) -> nullcontext[None]:
    return nullcontext()


@contextmanager
def machine(device: torch.device = CUDA) -> Iterator[Machine]:
    """Inside, ``device`` is there."""
    present = Machine(device)
    optimizer = sys.modules["torch.optim.optimizer"]
    fused = [*optimizer._get_fused_kernels_supported_devices(), "meta"]
    with (
        mock.patch("torch.cuda._lazy_init", return_value=None),
        mock.patch("torch.cuda.current_device", return_value=0),
        # Said once: torch's way of finding out takes longer than the operation that it asks before.
        mock.patch("torch.cuda.is_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch.object(optimizer, "_get_fused_kernels_supported_devices", return_value=fused),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: present.pin(tensor)),
        # torch knows no autocast for a device that computes nothing.
        mock.patch("torch.autocast", _no_autocast if device.type == "meta" else torch.autocast),
        warnings.catch_warnings(),
        present,
    ):
        warnings.filterwarnings("ignore", message=".*self.trainer. reference is not registered.*")
        yield present


def without_values(module: nn.Module, device: torch.device) -> nn.Module:
    """The same module on a device of :func:`machine`, inside of which this is called."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                part._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        if isinstance(part, Method):
            part._device = device
    return module


def batch_on(data: PretrainData, size: tuple[int, int], device: torch.device, images: int = 2) -> Batch:
    """A batch that went from the loader to the device and through the views there."""
    crops, labels, keys = loaded(data, size, images)
    moved = [view.pin_memory().to(device, non_blocking=True) for view in crops]
    views = without_values(data.views, device)(moved, RowGenerator(keys))
    return views, labels.pin_memory().to(device, non_blocking=True)


def loaded(data: PretrainData, size: tuple[int, int], images: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Crops of noise, labels and keys, as the loader gives them."""
    data.views.configure(size, *data.statistics(3), EIGHT_BIT)
    noise = torch.randint(256, (images, 3, *size), dtype=torch.uint8)
    crops, labels, keys, *_ = collate([(data.views.crop(image), -1, key, []) for key, image in enumerate(noise)])
    return crops, labels, keys

"""What a step says to seven other processes that are not there, counted: DDP and FSDP2 of every method, in one process.

The `fake` process group answers at once and with nothing, so each answer is filled in as if all had what this one has.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from fake_gpu import loaded
from prepared_methods import prepared
from recipes import ROOT, SETTINGS
from tiers import fast
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mim.distributed.sharding import shard
from mim.randomness import RowGenerator

PROCESSES = 8

FORWARD = {
    "capi": {"allreduce_": 4},  # the highest of the logits, and three rounds that balance them
    "dinov2": {
        "allgather_": 2,
        "allreduce_": 8,
    },  # class tokens of both views for KoLeo, and three rounds for each head
    "spark": {"allgather_": 29},  # statistics of each synchronised batch normalisation
}
BACKWARD = {"dinov2": {"allreduce_": 2}, "spark": {"allreduce_": 29}}
UPDATE = {"ibot": {"allreduce_": 1}, "attmask": {"allreduce_": 1}}  # centres
CLIPPED = ("ibot", "attmask", "dinov2")
"""Sharded gradients have a norm of each tensor to agree on; those of DDP are whole in every process."""


class Answers(TorchDispatchMode):
    """Counts collectives, and fills in what the others would have said.

    Attributes:
        made: how often each was called.
        gathered: numbers that the largest gather of values other than sharded weights sent.
    """

    def __init__(self):
        super().__init__()
        self.made, self.gathered = Counter(), 0

    def taken(self):
        made, self.made = dict(self.made), Counter()
        return made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the tensors of this process that it consists of come here next
        result = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d" or (namespace == "_c10d_functional" and "all" in name):
            self.made[name] += 1
            self._answer(name, args)
        return result

    def _answer(self, name, args):
        if name == "_allgather_base_":
            args[0].view(PROCESSES, -1).copy_(args[1].reshape(1, -1).clone())
        elif name == "_reduce_scatter_base_":
            args[0].copy_(args[1].view(PROCESSES, -1)[0].view_as(args[0]))
        elif name == "allgather_":
            self.gathered = max(self.gathered, *(value.numel() for value in tree_leaves(args[1])))
            for answers, value in zip(args[0], args[1], strict=True):
                for answer in answers:
                    answer.copy_(value)


@pytest.fixture(autouse=True)
def _eight_processes(monkeypatch):
    monkeypatch.chdir(ROOT)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=PROCESSES)
    yield
    dist.destroy_process_group()


def spread(method, kind):
    """The training step of a method of which every process has a share, or a copy."""
    if kind == "fsdp":
        shard(method, init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("data_parallel",)))
        return method.training_step
    method.forward = method.training_step
    wrapped = DistributedDataParallel(method)
    wrapped.register_comm_hook(None, sum_bucket)  # torch's own asks the fake group for an answer that it does not have
    return wrapped


def sum_bucket(state, bucket):
    dist.all_reduce(bucket.buffer())
    answer = torch.futures.Future()
    answer.set_result(bucket.buffer())
    return answer


def stepped(name, kind, images):
    """Collectives of forward pass, backward pass and update; numbers in the largest gather, and in an image."""
    method, data = prepared(name)
    crops, labels, keys = loaded(data, method.encoder.img_size, images)
    batch = data.views(crops, RowGenerator(keys)), labels
    step, optimizer = spread(method, kind), method.configure_optimizers()
    method.on_train_batch_start(batch, 0)
    with Answers() as answers:
        loss = step(batch, 0)
        forward = answers.taken()
        loss.backward()
        backward = answers.taken()
        method.on_before_optimizer_step(optimizer)
        method.optimizer_step(0, 0, optimizer)
    return forward, backward, answers.taken(), answers.gathered, batch[0][0][0].numel()


def expected(name, kind):
    """The weights are gathered once and their gradients summed once; all agree whether the step counts."""
    forward, backward, update = (Counter(table.get(name, {})) for table in (FORWARD, BACKWARD, UPDATE))
    update["allreduce_"] += 1
    if kind == "fsdp":
        forward["_allgather_base_"] += 1
        backward["_reduce_scatter_base_"] += 1
        update["all_reduce"] += 1 + (name in CLIPPED)
    else:
        backward["allreduce_"] += 1
    return forward, backward, update


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", fast(SETTINGS, ["simmim"]))
def test_a_step_of_eight_processes_makes_these_collectives_however_many_images_there_are(name, kind):
    few, many = (stepped(name, kind, images) for images in (2, 4))
    assert few[:3] == many[:3]
    forward, backward, update, gathered, image = many
    assert forward.pop("broadcast_", 0) <= 3 * (kind == "ddp")  # buffers, one per type of number
    assert (forward, backward, update) == expected(name, kind)
    assert gathered < image

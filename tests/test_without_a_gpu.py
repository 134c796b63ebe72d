"""What runs beside each step never waits for a GPU, keeps its devices apart, and counts in float32 where it must."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fake_gpu import CUDA, META, HostWaitError, batch_on, machine, without_values
from prepared_methods import prepared
from recipes import ROOT, SETTINGS
from small_models import EVERY, build, fits
from tiers import fast
from torch import nn

from mim import masking
from mim.data.pixels import Pixels
from mim.data.views import MultiCrop, SingleView
from mim.encoder import Encoder
from mim.evaluation.attentive import AttentiveHeads, MultiQueryPooling
from mim.evaluation.features import Features
from mim.evaluation.finetune import Finetune, classifier
from mim.evaluation.knn import nearest
from mim.evaluation.linear_probe import LinearHeads
from mim.evaluation.segmentation import SegmentationOptim, SemanticSegmentation
from mim.evaluation.segmentation_heads import KNNHead, LinearHead, UPerHead
from mim.evaluation.windows import Inference
from mim.masking import BoxMasking
from mim.options.classification import FinetuneRecipe
from mim.randomness import RowGenerator
from mim.reduction import TokenReducedViT
from mim.targets import HOGTarget

PRODUCTS = ("addmm", "aten.mm.default", "convolution.default")
"""What most of the arithmetic of a step is."""
FLOAT32 = ("_softmax", "log_softmax", "logsumexp", "sort", "topk", "argmax", "mse_loss", "_fused_adamw", "vector_norm")
"""Operations whose numbers bf16 would round to ties or nothing: softmax, rankings, losses, updates, lengths."""


def step(method, data, device, precision=torch.float32, nodata=False):
    """A whole training step on a device without values; what happened there."""
    with machine(device) as present:
        without_values(method, device)
        batch = batch_on(data, method.encoder.img_size, device)
        if nodata:
            batch = *batch, [torch.empty(len(v), 1, *v.shape[2:], dtype=torch.bool, device=device) for v in batch[0]]
        method.on_train_batch_start(batch, 0)
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            loss = method.training_step(batch, 0)
        if device == META:
            loss.backward()
        else:  # torch has no backward pass without the driver
            for parameter in (p for p in method.parameters() if p.requires_grad):
                parameter.grad = torch.empty_like(parameter)
        optimizer = method.configure_optimizers()
        method.on_before_optimizer_step(optimizer)
        method.optimizer_step(0, 0, optimizer)
    return SimpleNamespace(loss=loss, calls=present.calls, method=method)


@pytest.fixture(autouse=True)
def _paths_start_at_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@functools.cache
def stepped(name):
    """A step of a recipe on a GPU in bf16."""
    return step(*prepared(name), CUDA, torch.bfloat16)


every_recipe = pytest.mark.parametrize("name", fast(SETTINGS, ("mae", "hpm", "ibot", "ijepa")))
"""In the fast suite one of each kind: pixels, a teacher's scores, a teacher of several views, a predictor."""


@every_recipe
def test_a_step_from_the_views_to_the_teacher_waits_for_nothing(name):
    done = stepped(name)
    assert done.loss.device == CUDA
    assert "aten._fused_adamw_.default" in {call for call, _ in done.calls}


@every_recipe
def test_a_step_in_bf16_keeps_losses_rankings_and_what_is_logged_in_float32(name):
    done = stepped(name)
    assert {done.loss.dtype, *(value.dtype for value in done.method.logged.values())} == {torch.float32}
    assert {kind for call, kind in done.calls if any(part in call for part in FLOAT32)} <= {torch.float32, None}
    assert {kind for call, kind in done.calls if any(part in call for part in PRODUCTS)} >= {torch.bfloat16}
    buffers = {buffer.dtype for buffer in done.method.buffers() if buffer.is_floating_point()}
    assert {p.dtype for p in done.method.parameters()} | buffers == {torch.float32}


@pytest.mark.parametrize("name", fast(SETTINGS, ["simmim"]))
def test_the_backward_pass_of_a_step_waits_for_nothing_and_reaches_every_parameter(name):
    done = step(*prepared(name), META)
    parameters = {key: p for key, p in done.method.named_parameters() if p.requires_grad}
    frozen = {key for key in parameters if "prototypes" in key}  # in the first epoch
    assert {key for key, p in parameters.items() if p.grad is None} <= frozen


OPTIONS = {
    "a policy of rectangles": ("mae", "--model.init_args.masking", "RectangleMasking"),
    "edges as targets": ("simmim", "--model.init_args.target", "HOGTarget"),
    "mixed layers": ("mae", "--model.init_args.cross", "{predicted: 0.5, mixed: 2}"),
    "anchors": ("mae", "--model.init_args.optim.anchor", "{weights: 0.1, gram: 1.0, features: 0.5}"),
    "the encoder held and its layers apart": (
        "mae",
        "--model.init_args.optim.head_warmup=0.5",
        "--model.init_args.optim.layer_decay=0.7",
    ),
    "difficulty regressed": ("hpm", "--model.init_args.difficulty.loss", "absolute"),
    "smooth places": ("mp3", "--model.init_args.positions", "{smoothing: 2.0, temperature: 0.1}"),
    "a guard against collapse": ("ijepa", "--model.init_args.guard", "{weight: 0.02, patches: 2}"),
    "learned frequencies": ("simmim", "--model.init_args.encoder.model", "vit_small_patch16_rope_mixed_224"),
    "tokens that pass by the middle": (
        "simmim",
        "--model.init_args.encoder.kwargs",
        "{embed_dim: 32, depth: 4, num_heads: 2}",
        "--model.init_args.middle_share",
        "0.5",
    ),
    "activations computed again": ("simmim", "--model.init_args.encoder.grad_checkpointing", "true"),
}


@pytest.mark.middle
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_step_with_an_option_waits_for_nothing(kind):
    name, *changes = OPTIONS[kind]
    assert step(*prepared(name, *changes), CUDA, torch.bfloat16).loss.dtype == torch.float32


@pytest.mark.middle
@every_recipe
def test_a_step_with_nodata_waits_for_nothing(name):
    assert step(*prepared(name), CUDA, torch.bfloat16, nodata=True).loss.dtype == torch.float32


ON_THE_CPU = ("BlockMasking", "MultiBlockMasking")
"""Drawn there by methods whose masks depend on nothing of the device, since their sizes are then known."""


@pytest.mark.parametrize("name", [name for name in masking.__all__ if name not in ("Masking", *ON_THE_CPU)])
def test_masks_are_drawn_on_the_device_without_waiting(name):
    policy = BoxMasking([(0.0, 0.0, 0.5, 0.2)]) if name == "BoxMasking" else getattr(masking, name)()
    policy.fit((6, 4))
    with machine():
        scores = torch.empty(4, 24, device=CUDA) if policy.guided else None
        rows = RowGenerator.for_rows(0, 0, 4, CUDA)
        assert policy(4, (6, 4), scores=scores, progress=0.5, generator=rows).device == CUDA


def test_masks_of_blocks_are_drawn_on_the_cpu_and_sent():
    method, _ = prepared("ibot")
    assert type(method.masking).__name__ in ON_THE_CPU
    with machine() as present:
        without_values(method, CUDA)
        present.calls.clear()
        assert method.draw_masks(2, None, 0).device.type == "cpu"
    assert present.calls == []


def test_edges_are_found_on_the_device_without_waiting():
    with machine():
        images, places = torch.empty(2, 3, 32, 32, device=CUDA), torch.zeros(2, 4, dtype=torch.int64, device=CUDA)
        valid = torch.empty(2, 1, 32, 32, dtype=torch.bool, device=CUDA)
        target, _ = HOGTarget().measured(images, (4, 4), places, valid)
    assert (target.device, target.shape) == (CUDA, (2, 4, 108))


PIXELS = {
    "bytes": (torch.uint8, Pixels(type="uint8")),
    "uint16": (torch.uint16, Pixels((0.0,), (4095.0,), "uint16")),
    "floats with nodata": (torch.float32, Pixels((-1.0, 0.0, 0.0), (1.0, 2.0, 3.0), "float32")),
}


@pytest.mark.parametrize("views", [SingleView(), MultiCrop(local_crops=1, local_size=16, blur=(0.1, 0.5))])
@pytest.mark.parametrize("kind", PIXELS)
def test_views_are_finished_on_the_device_without_waiting(views, kind):
    dtype, pixels = PIXELS[kind]
    views.configure((32, 32), [0.5] * 3, [0.25] * 3, pixels)
    sizes = [32] if isinstance(views, SingleView) else [32, 32, 16]
    with machine():
        batch = [torch.empty(4, 3, size, size, dtype=dtype, device=CUDA) for size in sizes]
        finished = without_values(views, CUDA)(batch, RowGenerator(torch.arange(4)))
    assert {view.dtype for view in finished} == {torch.float32}
    assert {view.device for view in finished} == {CUDA}


@pytest.mark.parametrize("pool", ["cls", "mean", "both", "tokens"])
def test_features_are_extracted_without_waiting(pool):
    encoder = Encoder("test_vit", img_size=32, patch_size=8).eval()
    with machine(), torch.inference_mode(False), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        images = torch.empty(2, 3, 32, 32, device=CUDA)
        pooled, patches = Features(1, pool).with_patches(without_values(encoder, CUDA), images)
    assert (pooled.device, pooled.dtype, patches.dtype) == (CUDA, torch.float32, torch.float32)


def test_neighbours_are_searched_without_waiting():
    with machine():
        bank, labels = torch.empty(50, 8, device=CUDA), torch.zeros(50, dtype=torch.int64, device=CUDA)
        similarity, answers = nearest(bank, labels, torch.empty(9, 8, device=CUDA), 20)
    assert (similarity.shape, answers.shape, answers.device) == ((9, 20), (9, 20), CUDA)


def test_heads_of_probes_learn_without_waiting():
    linear = LinearHeads(8, 3, 2, "batch", seed=0)
    attentive = AttentiveHeads(nn.Sequential(MultiQueryPooling(8, 2), nn.Linear(8, 3)), 2)
    with machine():
        for heads in (linear, attentive):
            without_values(heads, CUDA)
        labels = torch.zeros(4, dtype=torch.int64, device=CUDA)
        weight, bias = linear.gradients(torch.empty(4, 8, device=CUDA), labels)
        logits = attentive(torch.empty(4, 5, 8, device=CUDA))
    assert (weight.shape, bias.shape, logits.shape) == ((8, 2, 3), (2, 3), (4, 2, 3))


WINDOWS = Inference("slide", crop=32, stride=16)
HEADS = {
    "linear": lambda dim: LinearHead(dim, 2, 3),
    "upernet": lambda dim: UPerHead(dim, 3, auxiliary=4),
    "knn": lambda dim: KNNHead(torch.zeros(30, dim * 2), torch.zeros(30, dtype=torch.int64), 3),
}


@pytest.mark.parametrize("kind", fast(HEADS, ("linear", "knn")))
def test_segmentation_learns_without_waiting(kind):
    encoder = Encoder("test_vit", img_size=32, patch_size=8)
    taps = range(4) if kind == "upernet" else range(2)
    taps = [min(tap, encoder.depth - 1) for tap in taps]
    method = SemanticSegmentation(encoder, HEADS[kind](encoder.dim), taps, 3, SegmentationOptim(1e-3, 10), WINDOWS)
    method.log = lambda *_: None
    with machine():
        without_values(method, CUDA)._device = CUDA
        images = torch.empty(2, 3, 32, 32, device=CUDA)
        classes = torch.zeros(2, 32, 32, dtype=torch.uint8, device=CUDA)
        with torch.autocast("cuda", torch.bfloat16):
            loss = method.training_step((images, classes), 0)
        answer = method.eval().answer(images, (40, 24))
    assert (loss.device, loss.dtype, answer.shape) == (CUDA, torch.float32, (2, 40, 24))


@pytest.mark.parametrize("mixed", [0.8, 0.0])
def test_fine_tuning_learns_without_waiting(mixed):
    recipe = FinetuneRecipe(epochs=1, batch_size=4, pool="mean", mixup=mixed, cutmix=mixed, ema=0.9)
    encoder = Encoder("test_vit", img_size=32, patch_size=8)
    method = Finetune(classifier(encoder, 5, recipe, seed=0), recipe, 5, images=8, seed=0)
    method.log = lambda *_: None
    with machine():
        without_values(method, CUDA)._device = CUDA
        batch = [torch.empty(4, 3, 32, 32, device=CUDA)], torch.zeros(4, dtype=torch.int64, device=CUDA)
        with torch.autocast("cuda", torch.bfloat16):
            loss = method.training_step(batch, 0)
        method.after_optimizer_step()
    assert (loss.device, loss.dtype) == (CUDA, torch.float32)


@pytest.mark.middle
@pytest.mark.parametrize("name", EVERY)
def test_tokens_are_reduced_without_waiting(name):
    model = TokenReducedViT(build("plain"), EVERY[name]())
    assert fits("plain", name)
    with machine(), torch.no_grad():
        logits = without_values(model, CUDA)(torch.empty(2, 3, 40, 40, device=CUDA))
    assert (logits.device, logits.shape) == (CUDA, (2, 5))


FAULTS = {
    "item": lambda there, here: there.item(),
    "float": lambda there, here: float(there.sum()),
    "a condition": lambda there, here: 1 if there.sum() > 0 else 0,
    "tolist": lambda there, here: there.tolist(),
    "cpu": lambda there, here: there.cpu(),
    "cpu without blocking": lambda there, here: there.to("cpu", non_blocking=True),
    "numpy": lambda there, here: there.numpy(),
    "nonzero": lambda there, here: there.nonzero(),
    "a boolean index": lambda there, here: there[there > 0],
    "a write at a boolean index": lambda there, here: there.index_put_((there > 0,), there.new_zeros(4)),
    "where without values": lambda there, here: torch.where(there > 0),
    "unique": lambda there, here: there.unique(),
    "repeats of a tensor": lambda there, here: there.repeat_interleave(there.long()),
    "pinning what is there": lambda there, here: there.pin_memory(),
    "an index of the CPU": lambda there, here: there[here.long()],
    "an index by a list": lambda there, here: there[[0, 1]],
    "a list of numbers": lambda there, here: torch.tensor([1.0, 2.0], device=CUDA),
    "a new tensor": lambda there, here: there.new_tensor([1.0, 2.0]),
    "a blocking copy": lambda there, here: here.to(CUDA),
    "a copy in place": lambda there, here: there.copy_(here),
    "a large copy of pageable memory": lambda there, here: here.expand(9999, 4).clone().to(CUDA, non_blocking=True),
    "a sum of two devices": lambda there, here: there + here,
    "an index of the other device": lambda there, here: here[there.long()],
    "a loss of two devices": lambda there, here: F.mse_loss(there, here),
}
"""What must not happen beside a step, with a tensor of the device and one of the CPU."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    with machine() as present:
        there, here = torch.empty(4, device=CUDA), torch.ones(4)
        with pytest.raises((RuntimeError, HostWaitError)):
            FAULTS[fault](there, here)
    assert present.calls


def test_what_is_pinned_or_small_and_asynchronous_is_no_fault():
    with machine():
        large = torch.ones(9999, 4).pin_memory().to(CUDA, non_blocking=True)
        small = torch.ones(4).to(CUDA, non_blocking=True)
        scaled = large * 2.0 + torch.tensor(3.0)  # numbers travel as arguments of the kernel
    assert {large.device, small.device, scaled.device} == {CUDA}


@pytest.mark.parametrize(
    "plant",
    [
        lambda method: setattr(method, "log", lambda _, value: value.item()),
        lambda method: setattr(method.target, "loss", lambda a, b, _: F.mse_loss(a, torch.zeros(a.shape))),
        lambda method: setattr(method.target, "loss", lambda a, b, _: (a - b)[a > 0].mean()),
        lambda method: setattr(method, "after_optimizer_step", lambda step: method.nonfinite_step.item()),
        lambda method: setattr(method, "on_before_optimizer_step", lambda optimizer: method.raise_if_nonfinite()),
    ],
    ids=[
        "item in a log",
        "tensor of the CPU in a loss",
        "boolean index in a loss",
        "item after a step",
        "item in the guard",
    ],
)
def test_a_fault_planted_in_a_step_is_caught(plant):
    method, data = prepared("simmim")
    plant(method)
    with pytest.raises((RuntimeError, HostWaitError)):
        step(method, data, CUDA)

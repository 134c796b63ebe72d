"""What a run says of itself: before its first step, and after its last."""

import math
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import Trainer
from timm.models import is_model_pretrained
from torch import nn

from mim import __version__
from mim.data.pretrain import PretrainData
from mim.encoder import Encoder
from mim.hub import SCHEMES
from mim.lora import LoRALinear
from mim.methods import Method, Plan
from mim.program import called
from mim.run.checkpoint_files import KEEP, checkpoint_bytes
from mim.run.folder import RunFolder


def introduction(
    folder: RunFolder,
    trainer: Trainer,
    method: Method,
    data: PretrainData,
    model: str,
    labelled: bool,
    checked: tuple[int, tuple[int, int]],
) -> str:
    """What is going to happen, line by line.

    Args:
        folder: of the run.
        trainer: knows devices and precision.
        method: with its plan.
        data: opened.
        model: timm name.
        labelled: whether there are enough labels for probes.
        checked: how many images were read, and the smallest width and height among them.
    """
    plan, source = method.plan, data.source
    encoder = method.evaluated
    count, (width, height) = checked
    trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
    backbone = parameters(method.backbone)
    grid, patches = encoder.grid, math.prod(encoder.grid)
    name = method.name
    labels = f"{len(source.classes):,} labels" if source.labels else "no labels"
    if source.labels:
        labels += " -> k-NN and linear probe" if labelled else ", too few images of each for probes"
    others = getattr(source, "ignored", {}).items()
    ignored = ", ".join(f"{number} {kind}" for kind, number in others if not kind.startswith("masks"))
    device = device_name(trainer)
    size, patch = "x".join(map(str, encoder.img_size)), "x".join(map(str, encoder.patch_size))
    accumulate = trainer.accumulate_grad_batches
    per_device = plan.batch_size // trainer.world_size // accumulate
    damaged = getattr(source, "damaged", [])
    lines = [
        f"mim {__version__}  {name} on {model} ({shape(encoder)})   run {folder.path}",
        f"  data    {data.path}: {len(source):,} {getattr(source, 'unit', 'images')}, {labels}"
        + (f"; ignored: {ignored}" if ignored else ""),
        f"          checked {count:,}: {len(data.bad_files.reasons)} unreadable, smallest {width}x{height}",
        f"  model   {backbone / 1e6:.1f} M parameters, {trainable / 1e6:.1f} M trained with its heads; "
        f"{size} px / {patch} = {grid[0]}x{grid[1]} = {patches} patches",
        f"  mask    {method.mask_words()}",
        f"  optim   blr {method.optim.blr:.2e} x {plan.batch_size} / 256 -> lr {method.peak_lr:.2e}, "
        f"warm-up {method.warmup_steps:,} steps, AdamW, weight decay {method.optim.weight_decay}",
        f"  batch   {plan.batch_size} = {trainer.world_size} device x {per_device} x {accumulate} accumulate; "
        f"{plan.steps_per_epoch:,.1f} steps per epoch, {plan.max_steps:,} steps in {plan.epochs:g} epochs",
        *_few_images(len(source), plan),
        *_gently(method),
        f"  device  {device}, {trainer.precision}, {data.num_workers} workers, {torch.get_num_threads()} threads",
        f"  disk    {KEEP} checkpoints of {_size(checkpoint_bytes(method))}, export {_size(4 * backbone)}",
        f"  resume  {called('pretrain')} --resume {folder.path}",
    ]
    lines[3:3] = [f"  values  {data.describe_values()}"] if not data.plain else []
    lines[2:2] = [f"          {finding}" for finding in getattr(source, "findings", list)()]
    lines += [f"  damaged {error}" for error in damaged[:5]]
    if data.first_step:
        lines.append(f"  from    step {data.first_step:,} of {plan.max_steps:,}")
    return "\n".join(lines) + "\n"


def shape(encoder: Encoder) -> str:
    """What is built under a model's name, which settings may have changed: width, depth, image and patch size."""
    size, patch = ("x".join(map(str, sides)) for sides in (encoder.img_size, encoder.patch_size))
    blocks = f"{encoder.depth} blocks, " * hasattr(encoder.vit, "blocks")
    return f"{encoder.dim} wide, {blocks}{size} px / {patch}"


def architecture(method: Method) -> dict[str, Any]:
    """What is trained and what is taken home, for the report: plain types alone."""
    encoder, vit = method.evaluated, method.evaluated.vit
    attention = getattr(vit.blocks[0], "attn", None) if hasattr(vit, "blocks") else None
    parts = {name: module for name, module in method.named_children() if parameters(module)}
    return {
        "encoder": type(vit).__name__,
        "width": encoder.dim,
        "blocks": encoder.depth,
        "heads": getattr(attention, "num_heads", None),
        "patch": list(encoder.patch_size),
        "image": list(encoder.img_size),
        "channels": encoder.in_chans,
        "patches": list(encoder.grid),
        "prefix_tokens": encoder.num_prefix,
        "mask": method.mask_words(),
        "parts": {
            name: {
                "kind": type(module).__name__,
                "parameters": parameters(module),
                "trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
            }
            for name, module in parts.items()
        },
        "trained": sum(p.numel() for p in method.parameters() if p.requires_grad),
        "exported": parameters(method.backbone),
    }


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"


def device_name(trainer: Trainer) -> str:
    """What a run trains on."""
    return "cpu" if trainer.strategy.root_device.type == "cpu" else torch.cuda.get_device_name()


def parameters(module: nn.Module) -> int:
    """How many numbers a module has learnt or is going to learn."""
    return sum(parameter.numel() for parameter in module.parameters())


def _gently(method: Method) -> list[str]:
    """How good weights are treated, if they are."""
    optim, held = method.optim, method.held_steps
    rank = next((layer.down.shape[0] for layer in method.encoder.modules() if isinstance(layer, LoRALinear)), None)
    if not held and optim.layer_decay == 1 and not optim.anchor.holds and rank is None:
        return []
    added = "" if rank is None else f"; of it only additions of rank {rank} to its attention learn"
    anchors = [f"{name} {weight:g}" for name, weight in vars(optim.anchor).items() if weight]
    anchored = f", anchored by {' and '.join(anchors)}" if anchors else ""
    return [f"  start   encoder stands still for {held:,} steps, layer decay {optim.layer_decay:g}{anchored}{added}"]


def _few_images(images: int, plan: Plan) -> list[str]:
    """A line if the images do not fill a batch: the default batch then makes a run of very few steps."""
    if images >= plan.batch_size:
        return []
    fitting = 1 << max(0, (images // 3).bit_length() - 1)
    return [
        f"          {images:,} images at batch {plan.batch_size:,}: {plan.max_steps:,} steps in all; "
        f"--batch_size {fitting}   makes {round(plan.epochs * images / fitting):,} of them"
    ]


def random_start(config: Namespace) -> str | None:
    """A line for those who name published weights as the model, which is built from random ones."""
    encoder = config.model.init_args.encoder
    name = str(encoder.model)
    if config.init or encoder.pretrained or not (":" in name or (is_model_pretrained(name) and "." in name)):
        return None
    if name.startswith(SCHEMES):
        hint = "--model.init_args.encoder.pretrained true"
    else:
        hint = f"--init {name.removeprefix('local-dir:')}"
    return f"note: --model {name} trains from random weights; {hint} starts from its own"


def conclusion(
    folder: RunFolder, facts: dict[str, Any], probe: dict[str, Any], report: Path, difference: float, origin: str | None
) -> str:
    """What has come of a run, and how to use it.

    Args:
        folder: of the run.
        facts: of its summary.
        probe: scores by kind and by who was measured.
        report: the page.
        difference: largest one between the features of the encoder and of timm's copy.
        origin: weights that the run started from.
    """

    def mean(kind: str, who: str) -> float:
        return float(sum(probe[kind][who]) / len(probe[kind][who]))

    def compared(kind: str) -> str:
        beside = [f"{who} {mean(kind, who):.1%}" for who in ("untrained", "start") if who in probe[kind]]
        return f"{kind} {mean(kind, 'trained'):.1%} ({', '.join(beside)})"

    known = [kind for kind in ("knn", "linear") if "start" in probe.get(kind, {})]
    better = [kind for kind in known if mean(kind, "start") > mean(kind, "trained")]

    numbers = [f"loss {facts['loss']:.4f}", *(compared(kind) for kind in ("knn", "linear") if kind in probe)]
    bad = facts["bad_files"]
    return (
        f"\ndone in {duration(facts['wall_seconds'])}   {'   '.join(numbers)}\n"
        + (f"  start    was better by {' and '.join(better)}: {origin}\n" if better else "")
        + (f"  skipped  {bad} unreadable files, listed in {folder.bad_files}\n" if bad else "")
        + f"  report   {report}\n"
        f"  backbone {folder.backbone}   "
        f"(checked: timm gives the same features, max difference {difference:.0f})\n\n"
        "    import timm\n"
        f'    model = timm.create_model("local-dir:{folder.backbone}", pretrained=True)\n'
        "    features = model.forward_features(images)\n"
    )


def duration(seconds: float) -> str:
    """Like ``5h 41m``, ``12m 03s`` or ``8s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"

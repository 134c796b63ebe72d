"""The timm folder: what a run leaves behind and ``timm.create_model("local-dir:...")`` reads without this project."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from huggingface_hub import ModelCardData
from safetensors.torch import save
from timm.models.eva import Eva
from torch import nn

from mim.conv_nets import ConvNet
from mim.errors import UserError
from mim.interop.layouts import named_tensors
from mim.interop.reading import CHECKSUMS, sha256
from mim.lora import merge
from mim.program import quoted
from mim.randomness import keyed_generator
from mim.vit import ViT

_WEIGHTS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
_OWN = (_WEIGHTS, _CONFIG, _CARD, CHECKSUMS, "head.safetensors", "reduction.*", "static-*.yaml", "memory.*")
"""What an export consists of, with what fine-tuning puts beside it: replaced together."""
_POOLING = {"cls": "token", "mean": "avg"}  # timm's names
_POOLED = {"token": "class token", "avg": "mean of the patch tokens", "map": "attention pooling", "": "every token"}


_TRANSFORM = "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
_OWN_TRANSFORM = "# timm's transforms are for 8-bit pictures; what this model wants is told under Values below"


@dataclass(frozen=True)
class ModelCard:
    """Where weights come from, as their model card tells it.

    Args:
        method: class name of the method, such as ``MAE``.
        data: what ``--data`` named.
        data_licence: licence of the images as the user gave it, an SPDX-like name if it has one.
        images: how many images were trained on.
        epochs: passes over them.
        steps: optimizer steps.
        command: the command line of the run.
        notes: further lines, such as results or the commit.
    """

    method: str
    data: str
    data_licence: str = "unknown"
    images: int | None = None
    epochs: float | None = None
    steps: int | None = None
    command: str | None = None
    notes: tuple[str, ...] = ()


def export_backbone(
    vit: ViT | ConvNet,
    folder: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    card: ModelCard,
    model_args: dict[str, Any] | None = None,
    pool: Literal["cls", "mean"] | None = None,
    class_names: Sequence[str] | None = None,
    pixels: dict[str, Any] | None = None,
    img_size: Sequence[int] | None = None,
) -> float:
    """Write a timm folder, load it back through timm alone, compare, and only then put it in place.

    Args:
        vit: a model that ``timm.create_model`` built, on any device, training or not; it is not changed.
        folder: ``config.json``, ``model.safetensors``, model card and checksums; an earlier export there is replaced.
        mean: normalisation of the images it was trained on, one value per channel, for pixels in 0..1.
        std: as ``mean``.
        card: provenance.
        model_args: what the user passed to timm beyond image size, patch size and channels.
        pool: what ``model(images)`` gives: the class token or the mean of the patch tokens, behind the final norm. As
            ``vit`` does unless given, and always if it has attention pooling, whose weights are then kept.
        class_names: of a classifier, in the order of its outputs.
        pixels: scale of the numbers in the images if it is not 0 to 255, as ``mim.data.pixels`` writes it.
        img_size: height and width of the images, for models that are built for none, such as conv nets.

    Returns:
        The largest difference between the features of ``vit``, tokens and pooled, and the reloaded model's, which is 0.

    Raises:
        UserError: if ``folder`` holds anything but an export.
        RuntimeError: if timm cannot rebuild the model exactly; nothing is replaced then.
    """
    _refuse_to_replace(folder)
    # A float copy on the CPU: no side effect on the run, and the same arithmetic on both sides of the comparison.
    trained = deepcopy(vit).cpu().float().eval()
    merge(trained)
    if pool is not None and isinstance(trained, ViT) and trained.attn_pool is None:
        trained.global_pool = _POOLING[pool]
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in named_tensors(trained.state_dict()).items()}
    (partial / _WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))  # a full disk is then an OSError
    config = _timm_config(trained, model_args or {}, mean, std, img_size) | ({"pixels": pixels} if pixels else {})
    if class_names and len(class_names) == config["num_classes"]:
        config["label_names"] = list(class_names)
    (partial / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (partial / _CARD).write_text(_card_text(config, folder, card), encoding="utf-8")
    sums = [f"{sha256(partial / name)}  {name}\n" for name in (_CONFIG, _WEIGHTS, _CARD)]
    (partial / CHECKSUMS).write_text("".join(sums), encoding="utf-8")
    difference = _reload_difference(trained, partial)
    if difference != 0:  # also when it is not a number
        raise RuntimeError(
            f"timm's copy of the exported backbone differs by {difference}; kept for a look in {partial}"
        )
    _put_in_place(partial, folder)
    return difference


def _timm_config(
    vit: ViT | ConvNet,
    model_args: dict[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    img_size: Sequence[int] | None,
) -> dict[str, Any]:
    """The ``config.json`` that timm reads.

    Not timm's own writer: it keeps tag and licence of the architecture's published weights, and it changed within 1.0.
    """
    shape = _vit_shape(vit) if isinstance(vit, ViT) else {}
    channels, size = _input_of(vit)
    # Newer timm remembers what a model was built with, which includes what a folder it came from asked for.
    given = {**cast(dict[str, Any], getattr(vit, "_model_args", {})), **model_args}
    # transformers passes the number of classes itself, and would twice if it stood among the arguments.
    given = {key: value for key, value in given.items() if not key.endswith(("drop_rate", "path_rate", "num_classes"))}
    source = cast(dict[str, Any], vit.pretrained_cfg)
    kept = ("interpolation", "crop_pct", "crop_mode", "fixed_input_size", "classifier")
    pooling, first_conv = "avg", source.get("first_conv")
    if isinstance(vit, ViT):
        pooling, first_conv = vit.global_pool, "patch_embed.proj"
    return {
        "architecture": source["architecture"],
        "num_classes": vit.num_classes,
        "num_features": vit.num_features,
        "global_pool": pooling,
        "model_args": {**given, **shape, "in_chans": channels},
        "pretrained_cfg": {
            **{key: source[key] for key in kept if source.get(key) is not None},
            "input_size": [channels, *(size or img_size or source["input_size"][1:])],
            "mean": list(mean),
            "std": list(std),
            "num_classes": vit.num_classes,
            # Naming it makes older timm "adapt" every stem that is not RGB, even to its own channels: weights are lost.
            "first_conv": first_conv if channels == 3 else None,
        },
    }


def _input_of(net: ViT | ConvNet) -> tuple[int, list[int] | None]:
    """Channels, and the size of images if the model is built for one."""
    if isinstance(net, ViT):
        return net.patch_embed.proj.in_channels, list(net.patch_embed.img_size)
    return next(layer for layer in net.modules() if isinstance(layer, nn.Conv2d)).in_channels, None


def _vit_shape(vit: ViT) -> dict[str, Any]:
    """Arguments of timm that build the same ViT."""
    patch_height, patch_width = vit.patch_embed.patch_size
    rotary = isinstance(vit, Eva)
    registers = 0 if vit.reg_token is None else vit.reg_token.shape[1]
    shape: dict[str, Any] = {
        "img_size": list(vit.patch_embed.img_size),
        "patch_size": patch_height if patch_height == patch_width else [patch_height, patch_width],
        "in_chans": vit.patch_embed.proj.in_channels,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": cast(Any, vit.blocks[0]).attn.num_heads,
        "class_token": vit.cls_token is not None,
        "num_reg_tokens" if rotary else "reg_tokens": registers,
        "global_pool": vit.global_pool,
        # Unless told timm takes the place of the norm from the pooling, and then finds no weights for it.
        "use_fc_norm" if rotary else "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
        "dynamic_img_size": vit.dynamic_img_size,
    }
    if rotary:
        shape["use_post_transformer_norm"] = not isinstance(vit.norm, nn.Identity)
    return shape


def _card_text(config: dict[str, Any], folder: Path, card: ModelCard) -> str:
    """The model card: YAML front matter, three lines that load the model, provenance."""
    licence = card.data_licence
    task = "image-classification" if config["num_classes"] else "image-feature-extraction"
    auto = "AutoModelForImageClassification" if config["num_classes"] else "AutoModel"
    # The front matter wants an identifier; other wording is kept as a name.
    known = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence) is not None
    front = ModelCardData(
        library_name="timm",
        license=licence if known else "other",
        license_name=None if known else licence,
        tags=["timm", "transformers", task, "masked-image-modeling"],
        pipeline_tag=task,
    )
    channels, height, width = config["pretrained_cfg"]["input_size"]
    rows = {
        "Architecture": f"{config['architecture']}, {height}x{width} px, {channels} channels",
        "Values": _values(config),
        "Pretrained with": card.method,
        "Data": card.data if card.images is None else f"{card.data}, {card.images} images",
        "Licence of the data": licence,
        "Epochs": card.epochs,
        "Steps": card.steps,
        "Pooling": f"`model(images)`: {_POOLED.get(config['global_pool'], config['global_pool'])}",
        "Versions": f"torch {torch.__version__}, timm {timm.__version__}",
        "Command": card.command and f"`{card.command}`",
    }
    provenance = [f"- {name}: {value}" for name, value in rows.items() if value is not None]
    return f"""---
{front.to_yaml()}
---
# {config["architecture"]} {"fine-tuned on" if config["num_classes"] else "pretrained without"} labels ({card.method})

```python
import timm
model = timm.create_model({f"local-dir:{folder.as_posix()}"!r}, pretrained=True)
{_TRANSFORM if "pixels" not in config else _OWN_TRANSFORM}
```

`num_classes=10` adds a classifier, `features_only=True` gives feature maps, another `img_size` resizes the positions.
`model.forward_features(images)` gives the tokens. `transformers.{auto}.from_pretrained` takes the folder, too.
`sha256sum -c {CHECKSUMS}` checks the files.

## Provenance

{chr(10).join([*provenance, *(f"- {note}" for note in card.notes)])}
"""


def _values(config: dict[str, Any]) -> str | None:
    """What to do with the numbers in a file before the model sees them, unless it is what everybody does."""
    if (pixels := config.get("pixels")) is None:
        return None
    low, high = (ends[0] if len(ends) == 1 else ends for ends in (pixels["low"], pixels["high"]))
    clipped = ", clipped to 0..1" if pixels["clip"] else ""
    bands = f", bands {pixels['bands']} counted from 1" if pixels["bands"] else ""
    nodata = "" if pixels["nodata"] is None else f", {pixels['nodata']:g} is nodata and becomes the mean"
    scaled = "log(max(v, low) / low) / log(high / low)" if pixels.get("log") else "(v - low) / (high - low)"
    return (
        f"`x = {scaled}` for a {pixels['type']} number v, low {low}, high {high}{clipped}, then mean "
        f"and std of `pretrained_cfg`{bands}{nodata}"
    )


@torch.no_grad()
def _reload_difference(trained: ViT | ConvNet, folder: Path) -> float:
    """Largest absolute difference of tokens and pooled features on a random input, timm's copy against ``trained``."""
    with torch.random.fork_rng(devices=[]):  # timm initialises before it loads
        reloaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    size = reloaded.pretrained_cfg["input_size"]
    images = torch.rand(2, *size, generator=keyed_generator("export"))  # (2, C, H, W)
    tokens, again = (model.forward_features(images) for model in (trained, reloaded))
    pooled, pooled_again = trained.forward_head(tokens), reloaded.forward_head(again)
    differences = [(one - other).abs().max() for one, other in ((tokens, again), (pooled, pooled_again))]
    return float(torch.stack(differences).max())


def _refuse_to_replace(folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"{folder} is a file", hint=f"--out {quoted(folder.with_name(folder.stem + '-export'))}")
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    foreign = {name for name in names if not any(fnmatch(name, own) for own in _OWN)}
    if foreign:
        raise UserError(
            f"{folder} holds other files, so the export does not replace it",
            why=f"found {', '.join(sorted(foreign)[:3])}",
            hint=f"--out {quoted(folder / 'backbone')}",
        )


def _put_in_place(partial: Path, folder: Path) -> None:
    """Swap a whole folder in; whatever stops the program, one whole folder stays, here or beside it."""
    for path in (*partial.iterdir(), partial):
        _sync(path)
    previous = folder.with_name(f".{folder.name}.previous")
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

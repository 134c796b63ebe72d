"""Weights in and out: the timm folder that a run ends with, and the files a run may start from."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from jsonargparse import Namespace
from timm.models import is_model, is_model_pretrained
from timm.models.eva import Eva
from torch import Tensor, nn

from mim.conv_encoder import ConvEncoder, is_conv_net
from mim.conv_nets import ConvNet
from mim.data.pixels import EIGHT_BIT, Pixels
from mim.data.pretrain import PretrainData
from mim.encoder import Encoder
from mim.errors import UserError
from mim.evaluation.features import Pool
from mim.hub import missing_published
from mim.interop import (
    Built,
    ModelCard,
    adapt,
    arguments_of,
    built,
    built_otherwise,
    check_timm_folder,
    conv_net_in,
    deepspeed_weights,
    differences,
    export_backbone,
    hf_folder,
    likely_model,
    likely_rotary,
    load_weights,
    misfit,
    read_vit,
    refuse_otherwise,
    scale_of,
    to_rotary,
    weights_in,
)
from mim.interop.reading import export_again
from mim.lora import merge
from mim.memory import holds_memory
from mim.methods import Method
from mim.options.timm_names import no_such_weights
from mim.program import called
from mim.run.checkpoint_files import AtomicCheckpointIO, checkpoint_step, checkpoints, newest_good, sidecar, verify
from mim.run.config import instantiate, parse_saved
from mim.run.folder import run_of
from mim.vit import ViT, without_weights

__all__ = [
    "LoadedEncoder",
    "ModelCard",
    "check_published",
    "export_backbone",
    "foreign_model",
    "init_backbone",
    "load_encoder",
    "load_method",
    "load_weights",
    "restore_classifier",
    "untrained_encoder",
]


def load_method(run: Path, checkpoint: Path | None = None) -> tuple[Method, PretrainData, Namespace]:
    """A run's method with weights, its data (not opened) and its settings.

    Args:
        run: run folder.
        checkpoint: one of its own; the newest good one unless given.
    """
    config = parse_saved(run / "config.yaml")
    path, refused = (checkpoint, []) if checkpoint else newest_good(run / "checkpoints")
    if path is None:
        raise UserError(f"{run} has no checkpoint that can be used", why=refused[0] if refused else "it saved none yet")
    objects = instantiate(config)
    objects.model.load_state_dict(AtomicCheckpointIO(objects.model).load_checkpoint(path)["state_dict"])
    return objects.model.eval(), objects.data, config


class LoadedEncoder(NamedTuple):
    """An encoder to be measured and the images it expects.

    Args:
        encoder: with its weights, in evaluation mode.
        mean: per channel, of the pixels that it was trained on, on the scale of ``pixels``.
        std: as ``mean``.
        note: one line on where the weights come from and what was done to make them fit.
        pool: what stands for an image: its run's choice, or what timm's model pools by.
        pixels: scale of the numbers in the images.
    """

    encoder: Encoder
    mean: list[float]
    std: list[float]
    note: str
    pool: Pool
    pixels: Pixels = EIGHT_BIT


def load_encoder(
    weights: str,
    *,
    model: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    dynamic_img_size: bool = False,
    trust: bool = False,
) -> LoadedEncoder:
    """The encoder that ``--weights`` names: what every evaluation starts from.

    Args:
        weights: a run or timm folder, a checkpoint file, or a timm name, which timm may download.
        model: timm name of the model that a checkpoint file belongs to; guessed from its shapes if not given.
        img_size: side of the images in pixels if it is not the model's own; positions are resized, which ``note`` says.
        dynamic_img_size: accept images of any size; positions are resized for each.
        trust: see :func:`load_weights`.

    Raises:
        UserError: if nothing is found or the weights do not fit.
    """
    folder, run = Path(weights.removeprefix("local-dir:")), None if model else run_of(weights)
    if run is not None and (folder.is_file() or _is_unexported_run(folder)):
        return _from_checkpoint(run, folder.resolve() if folder.is_file() else None, img_size, dynamic_img_size)
    encoder = _build(weights, model, img_size, dynamic_img_size, trust)
    note = init_backbone(encoder.vit, weights, trust=trust, option="--weights").removeprefix("init: ")
    pool = encoder.pool if run is None else parse_saved(run / "config.yaml").pool
    (mean, std), foreign = encoder.statistics, hf_folder(folder)
    mean, std = (foreign and foreign.mean) or mean, (foreign and foreign.std) or std
    if len(mean) != encoder.in_chans:  # those of the architecture, which say nothing about these weights
        mean, std = PretrainData(weights).statistics(encoder.in_chans)
        note += f", normalised by {mean[0]:g} and {std[0]:g}, as it does not say by what"
    if holds_memory(folder):
        note += "; the memory of tasks that lies beside it is not part of the encoder"
    return LoadedEncoder(encoder.eval(), mean, std, note, pool, pixels_of(folder))


def _from_checkpoint(
    run: Path, checkpoint: Path | None, img_size: int | tuple[int, int] | None, dynamic_img_size: bool
) -> LoadedEncoder:
    """What a run evaluates, with the weights of one of its checkpoints or of the newest."""
    method, data, config = load_method(run, checkpoint)
    encoder, hint = method.evaluated, f"{called('export')} --run {run}   first"
    merge(encoder.vit)
    if img_size not in (None, encoder.img_size, encoder.img_size[0]):
        raise UserError(f"--img_size {img_size}: only an exported run can be resized", hint=hint)
    if dynamic_img_size and not encoder.any_size:
        raise UserError(f"--weights {run}: only an exported run takes images of any size", hint=hint)
    note = f"{checkpoint}" if checkpoint else f"newest checkpoint of {run}, which has not finished"
    return LoadedEncoder(encoder, *data.statistics(encoder.in_chans), note, config.pool, data.pixels)


def untrained_encoder(
    weights: str,
    seed: int,
    *,
    model: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    dynamic_img_size: bool = False,
    trust: bool = False,
) -> Encoder:
    """The encoder of :func:`load_encoder` before training, as ``seed`` draws it: the row to compare with."""
    run = None if model else run_of(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if run is None:
            return _build(weights, model, img_size, dynamic_img_size, trust).eval()
        config = parse_saved(run / "config.yaml")
        if img_size is not None:
            config.model.init_args.encoder.img_size = img_size
        if dynamic_img_size and "dynamic_img_size" in config.model.init_args.encoder:  # conv nets take any size
            config.model.init_args.encoder.dynamic_img_size = True
        method: Method = instantiate(config).model
        return method.evaluated.eval()


def restore_classifier(weights: str | Path, net: ViT | ConvNet) -> list[str] | None:
    """Gives a model the classifier of the timm folder that its other weights came from.

    Args:
        weights: a timm folder; of anything else there is no classifier to be had.
        net: with as many features.

    Returns:
        The names of its classes, numbers if the folder names none; None if there is no classifier.
    """
    home = Path(str(weights).removeprefix("local-dir:"))
    if not (home / "config.json").is_file() or hf_folder(home):
        return None
    config = json.loads((home / "config.json").read_text(encoding="utf-8"))
    if not (classes := int(config.get("num_classes") or 0)):
        return None
    net.reset_classifier(classes)
    head = cast(nn.Linear, net.get_classifier())
    (name,) = (name for name, part in net.named_modules() if part is head)
    tensors = load_weights(weights_in(home), option="--weights")
    head.load_state_dict({part: tensors[f"{name}.{part}"] for part in head.state_dict()})
    return list(config.get("label_names") or map(str, range(classes)))


def pixels_of(folder: Path) -> Pixels:
    """The scale that an exported folder, or that of a run, names; 8 bit if there is none."""
    homes = (folder, folder / "export" / "backbone")
    home = next((home for home in homes if (home / "config.json").is_file()), folder)
    try:
        return Pixels.of(scale_of(home))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{home / 'config.json'} is damaged", why=str(error), hint=export_again(home)) from error


def _is_unexported_run(folder: Path) -> bool:
    exported = any((home / "config.json").is_file() for home in (folder, folder / "export" / "backbone"))
    return (folder / "config.yaml").is_file() and not exported


def foreign_model(
    weights: str, model: str | None, img_size: int | tuple[int, int] | None = None, *, trust: bool = False
) -> tuple[str, dict[str, Any]]:
    """Name and arguments for ``timm.create_model`` that build what a file or a Hugging Face folder was made for.

    Args:
        weights: a file, or a folder of :func:`mim.interop.hf_folder`.
        model: timm name; guessed from the shapes if not given.
        img_size: side of the images in pixels; what a folder tells, or the model's own, if not given.
        trust: see :func:`load_weights`.
    """
    _, tensors, _ = _find_weights(weights, trust, "--weights")
    foreign = hf_folder(Path(weights.removeprefix("local-dir:")))
    name, size = (
        model or likely_rotary(tensors) or likely_model(tensors),
        img_size or (foreign.img_size if foreign else None),
    )
    if name is None:
        raise UserError(f"--weights {weights} does not say which model it belongs to", hint="--model vit_...")
    with without_weights():
        vit = Encoder(name, size).vit
    if isinstance(vit, Eva):
        tensors = to_rotary(tensors, vit)
    arguments = arguments_of(tensors, vit) | (built_otherwise(foreign.built, vit) if foreign else {})
    return name, arguments | ({"img_size": size} if size else {})


def _build(
    weights: str, model: str | None, img_size: int | tuple[int, int] | None, dynamic_img_size: bool, trust: bool
) -> Encoder:
    """The encoder that weights of no run belong to, as they themselves tell, with random weights."""
    dynamic = dynamic_img_size or None
    folder = Path(weights.removeprefix("local-dir:"))
    if not folder.exists():
        if model is None:
            check_published(weights, "--weights")
        return _encoder(model or weights, img_size, dynamic)
    if (home := _timm_home(folder)) is not None:
        if model is None:
            check_timm_folder(home, "--weights")
        return _encoder(model or f"local-dir:{home}", img_size, dynamic)
    if model is not None and is_conv_net(model):
        return _encoder(model, img_size, dynamic)
    name, arguments = foreign_model(weights, model, img_size, trust=trust)
    size, channels = arguments.pop("img_size", None), arguments.pop("in_chans", None)
    return Encoder(name, size, in_chans=channels, dynamic_img_size=dynamic, kwargs=arguments)


def _encoder(model: str, img_size: int | tuple[int, int] | None, dynamic: bool | None) -> Encoder:
    """The adapter of the family that a model is of."""
    if is_conv_net(model):
        return cast(Encoder, ConvEncoder(model, img_size))
    return Encoder(model, img_size, dynamic_img_size=dynamic)


def _timm_home(folder: Path) -> Path | None:
    """The timm folder that a folder is, or that lies in a run; None for what others wrote."""
    if not folder.is_dir() or hf_folder(folder):
        return None
    home = _weights_in(folder, "--weights")[0].parent
    return home if (home / "config.json").is_file() else None


def init_backbone(vit: ViT | ConvNet, weights: str, *, trust: bool = False, option: str = "--init") -> str:
    """Copy weights of any known layout into ``vit`` and say in one line what matched.

    Args:
        vit: takes the weights; unchanged if they do not fit.
        weights: a checkpoint file, a run or timm folder, or a timm name, which timm may download.
        trust: see :func:`load_weights`.
        option: the command-line option that named the weights, for messages.

    Raises:
        UserError: if nothing is found, or a tensor would stay random, or be left out, that every feature depends on.
    """
    layout, tensors, grid = _find_weights(weights, trust, option, None if isinstance(vit, ViT) else vit.state_dict())
    like = cast(ViT, vit)  # of a conv net these look at names and shapes alone
    found, own = _rotary(vit, weights, tensors, option) if isinstance(vit, Eva) else tensors, vit.state_dict()
    tensors, notes = adapt(found, vit, grid) if isinstance(vit, ViT) else (found, [])
    matched = {name: tensors[name] for name in own if _same_kind(tensors.get(name), own[name])}
    unlike = differences(tensors, own)
    if option == "--weights" or not unlike:  # of an evaluation's model it is enough not to name it
        refuse_otherwise(_built_of(weights), like, weights, option)
    if unlike:
        raise misfit(like, weights, found, tensors, unlike, option)
    vit.load_state_dict(matched, strict=False)
    left = [name for name in own if name not in matched]
    missing, other = ([name for name in left if (name in tensors) is there] for there in (False, True))
    notes += [f"not in it and left as they were: {', '.join(missing)}"] if missing else []
    notes += [f"of another shape in it and left as they were: {', '.join(other)}"] if other else []
    unused = len(tensors.keys() - matched.keys())
    notes += [f"{unused} of its tensors not used"] if unused else []
    return ", ".join([f"init: {len(matched)} of {len(own)} tensors from {weights} ({layout} layout)", *notes])


def _built_of(weights: str) -> Built:
    """How the model of some weights was built, as far as a folder, a run or timm's name tells."""
    path = Path(weights.removeprefix("local-dir:"))
    home = path if path.is_dir() else path.parent
    if foreign := hf_folder(home):
        return foreign.built
    try:
        with without_weights():
            if path.exists() and (run := run_of(weights)) and not (home / "config.json").is_file():
                encoder = parse_saved(run / "config.yaml").model.init_args.encoder
                return built(Encoder(encoder.model, kwargs=encoder.kwargs).vit)
            named: Any = timm.create_model(f"local-dir:{home}" if path.exists() else weights, num_classes=0)
            return built(named)
    except Exception:  # a folder of anybody's, which need not say anything
        return Built()


def _rotary(vit: Eva, weights: str, tensors: dict[str, Tensor], option: str) -> dict[str, Tensor]:
    """Tensors under the names of a rotary ViT; refuses a file whose attention has biases that ``vit`` lacks."""
    named = to_rotary(tensors, vit)
    name = cast(dict[str, Any], vit.pretrained_cfg)["architecture"]
    if (lost := [key for key in named if "attn.q_bias" in key or "attn.qkv.bias" in key]) and not any(
        key in vit.state_dict() for key in ("blocks.0.attn.q_bias", "blocks.0.attn.qkv.bias")
    ):
        raise UserError(
            f"{option} {weights} does not fit {name}",
            why=f"its attention has biases, as {lost[0]}, and this model has none",
            hint=f"--model {name}_qkvb" if is_model(f"{name}_qkvb") else "the --model that it was made with",
        )
    return named


def _find_weights(
    weights: str, trust: bool, option: str, conv_net: Collection[str] | None = None
) -> tuple[str, dict[str, Tensor], tuple[int, int] | None]:
    """Layout, tensors under timm's names and, where it is recorded, the grid of their positions.

    ``conv_net`` has the names of a conv net's tensors, if it is one that is looked for.
    """
    path, grid = Path(weights.removeprefix("local-dir:")), None
    if path.is_dir():
        path, grid = _weights_in(path, option)
    elif not path.exists():
        return _published(weights, option)
    grid = grid or _recorded_grid(path.parent) or _grid_of_run(path.parent.parent)
    path = path.resolve()  # last.ckpt is a link to a checkpoint, beside which its hash lies
    if path.match("step-*.ckpt") and sidecar(path).is_file() and (reason := verify(path)):
        earlier = [other for other in checkpoints(path.parent) if checkpoint_step(other) < checkpoint_step(path)]
        hint = f"{option} {earlier[-1]}" if earlier else None
        raise UserError(f"{option} {path} is damaged", why=reason, hint=hint)
    if conv_net is not None:
        return *conv_net_in(load_weights(path, trust=trust, option=option), conv_net), None
    return *read_vit(path, trust=trust, option=option), grid


def _weights_in(folder: Path, option: str) -> tuple[Path, tuple[int, int] | None]:
    """The weight file of a folder or a run, the export before the last checkpoint."""
    for home in (folder, folder / "export" / "backbone"):
        if (home / "config.json").is_file():
            return _present(weights_in(home), option), _recorded_grid(home)
    last, alone = folder / "checkpoints" / "last.ckpt", weights_in(folder)
    found = next(filter(Path.is_file, (last, alone)), None) or deepspeed_weights(folder, option)
    if found is None:
        raise UserError(
            f"{option} {folder} holds no weights",
            why="it is no timm or Hugging Face folder (config.json beside model.safetensors or pytorch_model.bin), no "
            "run (export/backbone or checkpoints/last.ckpt) and no checkpoint of DeepSpeed",
        )
    return found, None


def _present(weights: Path, option: str) -> Path:
    """The same; refuses a folder whose ``config.json`` has no weights beside it, and says what is there instead."""
    if weights.is_file():
        return weights
    others = sorted(
        file.name for file in weights.parent.iterdir() if file.suffix in (".msgpack", ".h5", ".onnx", ".npz")
    )
    raise UserError(
        f"{option} {weights.parent} holds no weights",
        why=f"it has {', '.join(others)}; " * bool(others) + "read are model.safetensors or pytorch_model.bin",
        hint=f"from_pretrained(...).save_pretrained('{weights.parent}')   with the program that reads them"
        if others
        else None,
    )


def _recorded_grid(folder: Path) -> tuple[int, int] | None:
    """``(h, w)`` of a timm folder's positions, if its config tells; not every export is square."""
    if foreign := hf_folder(folder):
        return foreign.grid
    try:
        args = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_args", {})
        size, patch = (torch.as_tensor(args[key]).expand(2) for key in ("img_size", "patch_size"))
        height, width = (size // patch).tolist()
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError):
        return None
    return height, width


def _grid_of_run(folder: Path) -> tuple[int, int] | None:
    """``(h, w)`` of the positions in a run's checkpoints, if its settings tell."""
    if not (folder / "config.yaml").is_file():
        return None
    encoder = parse_saved(folder / "config.yaml").model.init_args.encoder
    if encoder.img_size is None or encoder.get("patch_size") is None:
        return None  # the model's own, which are squares
    height, width = (int(side) // encoder.patch_size for side in torch.as_tensor(encoder.img_size).expand(2))
    return height, width


def _published(name: str, option: str) -> tuple[str, dict[str, Tensor], tuple[int, int] | None]:
    """Weights that timm fetches by name: the one door to the network, open only because the user named them."""
    check_published(name, option)
    hint = f"{option} FILE with weights on this machine, or the same command with a network connection"
    if reason := missing_published(name):
        raise UserError(f"{option} {name}: timm could not get these weights", why=reason, hint=hint)
    try:
        source = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError) as problem:  # a lost connection, a damaged download
        why = str(problem).partition("\n")[0]
        raise UserError(f"{option} {name}: timm could not get these weights", why=why, hint=hint) from problem
    grid = cast(tuple[int, int] | None, getattr(getattr(source, "patch_embed", None), "grid_size", None))
    return "timm", source.state_dict(), grid


def check_published(name: str, option: str) -> None:
    """Refuses what is neither there nor known to timm, addresses among it; raises ``UserError``."""
    if Path(name.removeprefix("local-dir:")).exists() or is_model_pretrained(name):
        return
    raise no_such_weights(name, option, timm.list_pretrained("vit_*"))


def _same_kind(tensor: Tensor | None, own: Tensor) -> bool:
    return tensor is not None and tensor.shape == own.shape and tensor.is_floating_point() == own.is_floating_point()

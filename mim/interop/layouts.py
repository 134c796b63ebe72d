"""Where a ViT lies in a checkpoint: under which container, behind which prefix, in whose words.

All of that is recognised by names of tensors, never by the name of the file. A new vocabulary is one function in
``translations.py`` and one line in ``_VOCABULARIES``.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mim.interop.translations import from_hugging_face, from_mae_pytorch, from_mmpretrain, from_timm

# Lightning, timm and HPM; MAE and its descendants; DeepSpeed; self-distillation and I-JEPA, whose published numbers are
# the teacher's; HPM's moving average, where nothing else is kept. An HPM file names its architecture under "model".
_CONTAINERS = ("state_dict", "model", "module", "teacher", "target_encoder", "student", "encoder", "ema_state_dict")
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # which stand anywhere in a name
# MoCo v3 evaluates its base encoder, not the momentum encoder beside it; averages follow what they are made of.
_SECOND = re.compile(r"student|momentum_encoder|(?:^|[._])ema(?:[._]|$)|decoder|predictor")
_DEPTH = 4  # containers inside each other


class NoViTError(ValueError):
    """Among these tensors there is no Vision Transformer."""


class _Vocabulary(NamedTuple):
    name: str
    block: re.Pattern[str]  # one weight of a block; its first group is the prefix of the whole ViT
    kernel: str  # the patch kernel's name behind that prefix
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]


class _Place(NamedTuple):
    vocabulary: _Vocabulary
    prefix: str
    complete: bool  # there is a patch kernel, which decoders and predictors have not


_HF_KERNEL = "embeddings.patch_embeddings.projection.weight"
_VOCABULARIES = (
    _Vocabulary(
        "timm",
        re.compile(r"((?:.*\.)?)blocks\.\d+\.(?:\d+\.)?attn\.(?:qkv|q_proj)\.weight"),
        "patch_embed.proj.weight",
        from_timm,
    ),
    _Vocabulary(
        "hugging face",
        re.compile(r"((?:.*\.)?)encoder\.layer\.\d+\.attention\.attention\.query\.weight"),
        _HF_KERNEL,
        from_hugging_face,
    ),
    _Vocabulary(
        "hugging face",
        re.compile(r"((?:.*\.)?)layers\.\d+\.attention\.q_proj\.weight"),
        _HF_KERNEL,
        from_hugging_face,
    ),
    _Vocabulary(
        "hugging face dinov3",
        re.compile(r"((?:.*\.)??)(?:model\.)?layer\.\d+\.attention\.q_proj\.weight"),
        "embeddings.patch_embeddings.weight",
        dict,  # to_rotary translates it
    ),
    _Vocabulary(
        "perception encoder",
        re.compile(r"((?:.*\.)??)(?:visual\.)?transformer\.resblocks\.\d+\.attn\.in_proj_weight"),
        "conv1.weight",
        dict,  # timm's own filter translates it
    ),
    _Vocabulary(
        "mmpretrain",
        re.compile(r"((?:.*\.)?)layers\.\d+\.attn\.qkv\.weight"),
        "patch_embed.projection.weight",
        from_mmpretrain,
    ),
)
LOOKED_FOR = (
    "blocks.N.attn.qkv.weight (timm), encoder.layer.N.attention.attention.query.weight (Hugging Face), "
    "layer.N.attention.q_proj.weight (its DINOv3), transformer.resblocks.N.attn.in_proj_weight (PE) and "
    "layers.N.attn.qkv.weight (mmpretrain) behind any prefix"
)
"""What a file must hold to be read, in words."""


def named_tensors(checkpoint: object) -> dict[str, Tensor]:
    """The dense tensors of a loaded checkpoint by name, without containers, optimizer and wrapper prefixes.

    Of several containers the first that holds a ViT is taken, a teacher's before a student's.

    Returns:
        Tensors of any shape; empty if ``checkpoint`` is not a checkpoint.
    """
    parts = sorted(_parts(checkpoint, ()), key=lambda part: [_standing_of_container(key) for key in part[0]])
    with_a_vit = (tensors for _, tensors in parts if _places(tensors))
    return next(with_a_vit, parts[0][1] if parts else {})


def to_timm(tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Name of the layout and the encoder's tensors under the names that timm's ``VisionTransformer`` uses.

    Raises:
        NoViTError: if there is no ViT among them.
    """
    places = _places(tensors)
    if not places:
        raise NoViTError(f"looked for {LOOKED_FOR}")
    place = _chosen(places, tensors)
    vit = {name.removeprefix(place.prefix): t for name, t in tensors.items() if name.startswith(place.prefix)}
    without_positions = place.prefix == "encoder." and "pos_embed" not in vit and "encoder_to_decoder.weight" in tensors
    if without_positions:
        return "mae-pytorch", from_mae_pytorch(vit)
    return _name(place, vit), place.vocabulary.convert(vit)


def _parts(checkpoint: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every mapping in a checkpoint that holds dense tensors, with the names of the containers around it."""
    if not isinstance(checkpoint, Mapping) or len(path) > _DEPTH:
        return
    dense = {
        _without_wrappers(str(name)): value
        for name, value in checkpoint.items()
        if isinstance(value, Tensor) and value.layout == torch.strided
    }
    if dense:
        yield path, dense
    for name, value in checkpoint.items():
        yield from _parts(value, (*path, str(name)))


def _standing_of_container(name: str) -> int:
    return _CONTAINERS.index(name) if name in _CONTAINERS else len(_CONTAINERS) + _standing(name)


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:  # compiled or sharded blocks carry it in the middle
        name = name.replace(wrapper, "")
    while name.startswith("module."):  # DataParallel and DDP
        name = name.removeprefix("module.")
    return name


def _places(tensors: Mapping[str, Tensor]) -> list[_Place]:
    """Every ViT among ``tensors``, in the order of its first block."""
    found: dict[str, _Place] = {}
    for name in tensors:
        for vocabulary in _VOCABULARIES:
            if (match := vocabulary.block.fullmatch(name)) and (prefix := match[1]) not in found:
                found[prefix] = _Place(vocabulary, prefix, f"{prefix}{vocabulary.kernel}" in tensors)
    return list(found.values())


def _chosen(places: list[_Place], tensors: Mapping[str, Tensor]) -> _Place:
    """The ViT that is meant: a whole one, a teacher before a student; of this project's runs, what is evaluated."""
    run = {place.prefix: place for place in places if place.prefix in (_RUN, f"teacher.module.{_RUN}")}
    if run:  # a teacher is evaluated if it has a head like the student's
        has_head = any(name.startswith("teacher.module.head.") for name in tensors)
        return (run.get(f"teacher.module.{_RUN}") if has_head else run.get(_RUN)) or next(iter(run.values()))
    return min(places, key=lambda place: (not place.complete, _standing(place.prefix)))


_RUN = "encoder.vit."
"""This project's checkpoints: the ViT sits in the method's encoder."""


def _standing(name: str) -> int:
    """0 for teachers, 2 for students and what their authors do not evaluate, 1 for all others."""
    if "teacher" in name or "target_encoder" in name:
        return 0
    return 2 if _SECOND.search(name) else 1


def _name(place: _Place, vit: Mapping[str, Tensor]) -> str:
    """What the user is told that the file looks like."""
    if place.prefix.endswith(_RUN):
        return "mim run"
    marks = {
        "hpm": "decoder_blocks_losspred.",
        "dinov2": "mask_token" if any(name.endswith("ls1.gamma") for name in vit) else "register_tokens",
        "mae": "decoder_",
        "ibot": "masked_embed",
    }
    if place.vocabulary.name == "timm":
        if kind := next((kind for kind, mark in marks.items() if any(name.startswith(mark) for name in vit)), None):
            return kind
        if place.prefix == "backbone.":
            return "ibot"
    return f"{place.vocabulary.name}, {place.prefix}*" if place.prefix else place.vocabulary.name

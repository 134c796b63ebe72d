"""Names of other programs' ViTs, translated to timm's: one function per vocabulary, prefixes already taken away."""

import re
from collections import defaultdict

import torch
from torch import Tensor

_PRETRAINING = ("mask_token", "masked_embed", "vis_mask_token", "decoder_", "decoder.")
"""Parts that only pretraining uses: tokens for hidden patches, and decoders that sit beside the encoder."""

_HUGGING_FACE = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.distillation_token": "dist_token",
    r"embeddings\.register_tokens": "reg_token",
    r"embeddings\.mask_token": "mask_token",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"(?:encoder\.layer|layers)\.(\d+)\.attention\.attention\.(query|key|value)\.": r"blocks.\1.attn.\2.",
    r"(?:encoder\.layer|layers)\.(\d+)\.attention\.q_proj\.": r"blocks.\1.attn.query.",
    r"(?:encoder\.layer|layers)\.(\d+)\.attention\.k_proj\.": r"blocks.\1.attn.key.",
    r"(?:encoder\.layer|layers)\.(\d+)\.attention\.v_proj\.": r"blocks.\1.attn.value.",
    r"(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:output\.dense|o_proj)\.": r"blocks.\1.attn.proj.",
    r"(?:encoder\.layer|layers)\.(\d+)\.layernorm_before\.": r"blocks.\1.norm1.",
    r"(?:encoder\.layer|layers)\.(\d+)\.layernorm_after\.": r"blocks.\1.norm2.",
    r"(?:encoder\.layer|layers)\.(\d+)\.(?:intermediate\.dense|mlp\.weights_in)\.": r"blocks.\1.mlp.fc1.",
    r"(?:encoder\.layer|layers)\.(\d+)\.(?:output\.dense|mlp\.weights_out)\.": r"blocks.\1.mlp.fc2.",
    r"(?:encoder\.layer|layers)\.(\d+)\.layer_scale([12])\.lambda1": r"blocks.\1.ls\2.gamma",
    r"(?:encoder\.layer|layers)\.(\d+)\.": r"blocks.\1.",
    r"layernorm\.": "norm.",
}
_MMPRETRAIN = {
    r"patch_embed\.projection\.": "patch_embed.proj.",
    r"layers\.(\d+)\.(?:ln|norm)([12])\.": r"blocks.\1.norm\2.",
    r"layers\.(\d+)\.ffn\.(?:layers\.0\.0|w12)\.": r"blocks.\1.mlp.fc1.",
    r"layers\.(\d+)\.ffn\.(?:layers\.1|w3)\.": r"blocks.\1.mlp.fc2.",
    r"layers\.(\d+)\.(?:attn|ffn)\.gamma([12])\.(?:weight|scale)": r"blocks.\1.ls\2.gamma",
    r"layers\.(\d+)\.": r"blocks.\1.",
    r"(?:ln|norm)1\.": "norm.",
    r"ln2\.": "fc_norm.",
    r"pre_norm\.": "norm_pre.",
}
_TIMM = {
    r"(blocks\.\d+)\.gamma_([12])": r"\1.ls\2.gamma",
    r"(blocks\.\d+)\.mlp\.w12\.": r"\1.mlp.fc1.",
    r"(blocks\.\d+)\.mlp\.w3\.": r"\1.mlp.fc2.",
    r"register_tokens": "reg_token",
}


def from_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dialects of timm's names: MAE, HPM, DINO, iBOT, DINOv2 with or without chunks."""
    return _renamed(_unchunked(_encoder_alone(tensors)), _TIMM)


def from_hugging_face(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``transformers``: ViT, ViTMAE, DeiT, DINOv2 and I-JEPA, as saved by its versions 4 and 5."""
    return _encoder_alone(_joined_attention(_renamed(tensors, _HUGGING_FACE)))


def from_mmpretrain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenMMLab's ``VisionTransformer`` and ``MAEViT``."""
    return _renamed(_encoder_alone(tensors), _MMPRETRAIN)


def from_mae_pytorch(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The MAE of which the files lack the positions: a fixed table for images of 224 pixels, without class token."""
    translated = from_timm(tensors)
    weight = translated["patch_embed.proj.weight"]
    patches = (224 // weight.shape[2]) * (224 // weight.shape[3])
    return {**translated, "pos_embed": _sinusoids(patches, len(weight))}


def join_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``q_bias`` and ``v_bias`` of BEiT and its descendants as one ``qkv.bias``; keys have none there."""
    joined = dict(tensors)
    for name in tensors:
        stem, found, _ = name.partition("attn.q_bias")
        if found and f"{stem}attn.v_bias" in tensors:
            query, value = joined.pop(name), joined.pop(f"{stem}attn.v_bias")
            joined[f"{stem}attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return joined


def _sinusoids(count: int, dim: int) -> Tensor:
    """The table of arXiv:1706.03762, sec. 3.5, ``(1, N, D)``: sines and cosines in turn."""
    rates = 10000 ** -(torch.arange(dim, dtype=torch.float64) // 2 * 2 / dim)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
    return torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos())[None].float()


def _renamed(tensors: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """Each name rewritten by the first pattern that its beginning matches."""
    patterns = [(re.compile(pattern), new) for pattern, new in table.items()]

    def rename(name: str) -> str:
        return next((pattern.sub(new, name, count=1) for pattern, new in patterns if pattern.match(name)), name)

    return {rename(name): tensor for name, tensor in tensors.items()}


def _encoder_alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_PRETRAINING)}


def _unchunked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``blocks.CHUNK.BLOCK.`` of DINOv2's sharded training as ``blocks.BLOCK.``; blocks are numbered through there."""
    chunk = re.compile(r"blocks\.\d+\.(?=\d+\.)")
    renamed = {chunk.sub("blocks.", name): tensor for name, tensor in tensors.items()}
    return renamed if len(renamed) == len(tensors) else tensors  # numbers that repeat would lose blocks


def _joined_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``query``, ``key`` and ``value`` as one ``qkv``."""
    joined: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*\.attn\.)(query|key|value)\.(weight|bias)", name):
            parts[f"{match[1]}qkv.{match[3]}"][match[2]] = tensor
        else:
            joined[name] = tensor
    for name, thirds in parts.items():
        if len(thirds) == 3:
            joined[name] = torch.cat([thirds[part] for part in ("query", "key", "value")])
        else:  # which no model has that this project knows; under their own names they are told of
            joined |= {name.replace("qkv", part): third for part, third in thirds.items()}
    return joined

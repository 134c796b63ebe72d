"""Weights of rotary ViTs under the names of timm's ``Eva``: by timm's own filter, and from Hugging Face's DINOv3."""

import re
from collections.abc import Mapping

import torch
from timm.models import is_model
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor

_DINOV3 = {384: "small", 768: "base", 1024: "large", 1280: "huge_plus", 4096: "7b"}
_HUGGING_FACE = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.register_tokens": "reg_token",
    r"embeddings\.patch_embeddings\.": "patch_embed.proj.",
    r"(?:model\.)?layer\.(\d+)\.attention\.o_proj\.": r"blocks.\1.attn.proj.",
    r"(?:model\.)?layer\.(\d+)\.attention\.([qkv])_proj\.": r"blocks.\1.attn.\2.",
    r"(?:model\.)?layer\.(\d+)\.layer_scale([12])\.lambda1": r"blocks.\1.gamma_\2",
    r"(?:model\.)?layer\.(\d+)\.mlp\.down_proj\.": r"blocks.\1.mlp.fc2.",
    r"(?:model\.)?layer\.(\d+)\.": r"blocks.\1.",
}
_ESSENTIAL = ("cls_token", "reg_token", "pos_embed", "patch_embed.", "blocks.")
_BIAS = re.compile(r"blocks\.\d+\.attn\.(?:qkv\.bias|q_bias|v_bias)")


def to_rotary(tensors: dict[str, Tensor], vit: Eva) -> dict[str, Tensor]:
    """Tensors of a file under the names of ``vit``; what has no place there keeps a name that ``vit`` has not.

    Args:
        tensors: of timm, of the original DINOv3, EVA, EVA-02 or PE, or of Hugging Face's DINOv3.
        vit: the model that will take them; not changed.
    """
    own = vit.state_dict()
    tensors = _from_hugging_face(tensors)
    # Fixed tables are made anew; only learned frequencies are weights.
    tensors = {name: tensor for name, tensor in tensors.items() if "rope" not in name or name == "rope.freqs"}
    lost = {} if any(_BIAS.fullmatch(name) for name in own) else _biases(tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in lost}
    renamed = {_scales(name): tensor for name, tensor in tensors.items()}
    if any(name.startswith(_ESSENTIAL) and name not in renamed for name in own):
        renamed = checkpoint_filter_fn(tensors, vit)
    # Biases of zero, which the original DINOv3 has in most sizes, are those of a model without them.
    return renamed | {name: bias for name, bias in lost.items() if bias.any()}


def likely_rotary(tensors: Mapping[str, Tensor]) -> str | None:
    """The timm name of the DINOv3 model that an original or Hugging Face file seems to be made for, or None."""
    renamed = _from_hugging_face(dict(tensors))
    registers = renamed.get("storage_tokens", renamed.get("reg_token"))
    kernel = renamed.get("patch_embed.proj.weight")
    if registers is None or kernel is None or kernel.ndim != 4 or "pos_embed" in renamed:
        return None
    plus = "_plus" * (kernel.shape[0] == 384 and any(".mlp.w1." in n or ".mlp.fc1_g." in n for n in renamed))
    biased = "_qkvb" * any(bias.any() for bias in _biases(renamed).values())
    name = f"vit_{_DINOV3.get(kernel.shape[0])}{plus}_patch{kernel.shape[-1]}_dinov3{biased}"
    return name if is_model(name) else None


def _biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Biases of queries and values; those of keys, which change no attention, are zero in every rotary ViT."""
    found = {name: tensor for name, tensor in tensors.items() if _BIAS.fullmatch(name)}
    whole = {name: bias.chunk(3) for name, bias in found.items() if name.endswith("qkv.bias")}
    return found | {
        name: torch.cat([query, torch.zeros_like(query), value]) for name, (query, _, value) in whole.items()
    }


def _scales(name: str) -> str:
    """Layer scale has another name in plain ViTs."""
    return re.sub(r"^(blocks\.\d+)\.ls([12])\.gamma$", r"\1.gamma_\2", name)


def _from_hugging_face(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv3 of ``transformers`` in timm's words; any other file as it is."""
    if not any(re.fullmatch(r"(?:model\.)?layer\.0\.attention\.q_proj\.weight", name) for name in tensors):
        return tensors
    renamed = {_renamed(name): tensor for name, tensor in tensors.items() if name != "embeddings.mask_token"}
    gated = any(".mlp.gate_proj." in name for name in renamed)
    joined: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        stem, _, kind = name.rpartition(".attn.")
        if kind == "q.weight":
            joined[f"{stem}.attn.qkv.weight"] = torch.cat([renamed[f"{stem}.attn.{part}.weight"] for part in "qkv"])
        elif kind in ("q.bias", "v.bias"):
            joined[f"{stem}.attn.{kind[0]}_bias"] = tensor
        elif kind not in ("k.weight", "v.weight"):
            name = name.replace(".mlp.gate_proj.", ".mlp.fc1_g.")
            joined[name.replace(".mlp.up_proj.", ".mlp.fc1_x." if gated else ".mlp.fc1.")] = tensor
    return joined


def _renamed(name: str) -> str:
    matches = ((re.match(pattern, name), pattern, new) for pattern, new in _HUGGING_FACE.items())
    return next((re.sub(pattern, new, name, count=1) for match, pattern, new in matches if match), name)

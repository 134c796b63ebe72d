"""What the shapes of weights do not tell and features depend on: heads of the attention, activation of the MLP."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor

from mim.errors import UserError
from mim.vit import ViT

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu": F.relu,
    "silu": F.silu,
}
"""Under timm's names."""
_HUGGING_FACE = {
    **{name: name for name in _ACTIVATIONS},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"), "gelu_tanh"),
    **{"gelu_python": "gelu", "swish": "silu"},
}


class Built(NamedTuple):
    """How a ViT was built.

    Args:
        num_heads: of every block; None if it is not known.
        act_layer: activation in timm's words; None if it is not known, or the MLP is gated.
    """

    num_heads: int | None = None
    act_layer: str | None = None


def built(vit: ViT) -> Built:
    """How a timm model is built; one on the meta device will do."""
    if not hasattr(vit, "blocks"):
        return Built()  # a conv net's shapes tell all
    block: Any = vit.blocks[0]
    return Built(block.attn.num_heads, _activation(block.mlp.act) if type(block.mlp) is Mlp else None)


def built_of_hugging_face(config: dict[str, Any]) -> Built:
    """What the ``config.json`` of a Hugging Face folder says."""
    heads, activation = config.get("num_attention_heads"), config.get("hidden_act")
    gated = config.get("use_swiglu_ffn") or config.get("use_gated_mlp")
    known = _HUGGING_FACE.get(activation) if isinstance(activation, str) and not gated else None
    return Built(heads if isinstance(heads, int) else None, known)


def built_otherwise(weights: Built, vit: ViT) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` with which ``vit`` would compute as the model of the weights did."""
    own = built(vit)._asdict()
    return {
        name: value
        for name, value in weights._asdict().items()
        if value is not None and own[name] is not None and value != own[name]
    }


def refuse_otherwise(weights: Built, vit: ViT, named: str, option: str) -> None:
    """Refuses weights of a model that computed otherwise, although every shape is the same.

    Args:
        weights: how their model was built.
        vit: would take them.
        named: what the user named.
        option: the command-line option that named it.

    Raises:
        UserError: naming both.
    """
    if not (arguments := built_otherwise(weights, vit)):
        return
    own = built(vit)._asdict()
    words = {"num_heads": "heads", "act_layer": "activation"}
    why = "; ".join(f"{words[name]} {value} there, {own[name]} here" for name, value in arguments.items())
    hint = f"--model.init_args.encoder.kwargs '{json.dumps(arguments)}'"
    if option == "--weights":  # evaluations build what the weights say if nobody says otherwise
        hint = "leave --model out"
    raise UserError(f"{option} {named} is of a model that computes otherwise", why=why, hint=hint)


def _activation(module: Any) -> str | None:  # noqa: ANN401 - whatever timm builds
    points = torch.linspace(-4, 4, 65, device="cpu")  # also where the model itself is on the meta device
    try:
        given = module(points)
    except (RuntimeError, NotImplementedError):  # one with weights, on the meta device
        return None
    return next((name for name, own in _ACTIVATIONS.items() if torch.allclose(given, own(points), atol=1e-5)), None)

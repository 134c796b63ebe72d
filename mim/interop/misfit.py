"""What to tell somebody whose weights do not fit a model."""

import json
from math import isqrt
from typing import Any, cast

from torch import Tensor

from mim.errors import UserError
from mim.interop.fit import Difference, arguments_of, likely_model
from mim.interop.rotary import likely_rotary
from mim.vit import ViT

_ANOTHER_MODEL = 0.1  # share of the model's tensors beyond which a file was made for another model
_SHOWN = 4


def misfit(
    vit: ViT,
    weights: str,
    found: dict[str, Tensor],
    adapted: dict[str, Tensor],
    unlike: list[Difference],
    option: str,
) -> UserError:
    """The mistake in words: shapes on both sides, and the option that mends it.

    Args:
        vit: the model.
        weights: what the user named.
        found: tensors under timm's names as the file has them.
        adapted: those after :func:`mim.interop.fit.adapt`.
        unlike: see :func:`mim.interop.fit.differences`.
        option: the command-line option that named the weights.
    """
    own, guess = vit.state_dict(), likely_rotary(found) or likely_model(found)
    lacking = [name for name in own if name not in adapted or adapted[name].shape != own[name].shape]
    matched, beyond = len(own) - len(lacking), len(adapted.keys() - own.keys())
    blocks = "blocks." if hasattr(vit, "blocks") else ""
    many = sum(name.startswith(blocks) for name in lacking) > _ANOTHER_MODEL * len(own)
    other_blocks = any(one.name.startswith("blocks.") for one in unlike)
    if many:
        qkv = [one for one in unlike if one.name == "blocks.0.attn.qkv.weight"]
        text = f"e.g. {(qkv or unlike)[0]}" + (f" -> looks like {guess}" if guess else "")
    else:
        text = "; ".join(map(str, unlike[:_SHOWN])) + (f"; and {len(unlike) - _SHOWN} more" * (len(unlike) > _SHOWN))
    deeper = f", but {beyond} of its own have no place" if not many and other_blocks and beyond else ""
    return UserError(
        f"{option} {weights} does not fit {cast(dict[str, Any], vit.pretrained_cfg)['architecture']}",
        why=f"matched {matched} of {len(own)} tensors{deeper}; {text}",
        hint=(None if other_blocks else _remedy(vit, found)) or (f"--model {guess}" if guess else _OTHER_MODEL),
    )


_OTHER_MODEL = "the --model that these weights were made with"


def _remedy(vit: ViT, found: dict[str, Tensor]) -> str | None:
    """Options that build the model that the file was made for."""
    arguments = arguments_of(found, vit)
    options = [f"--in_chans {arguments.pop('in_chans')}"] if "in_chans" in arguments else []
    if arguments:
        options.append(f"--model.init_args.encoder.kwargs '{json.dumps(arguments)}'")
    return " ".join(options) or _sizes(vit, found)


def _sizes(vit: ViT, found: dict[str, Tensor]) -> str | None:
    """Image sizes that give as many patches as the file has positions, if they are the trouble."""
    if not hasattr(vit, "pos_embed"):
        return None
    positions, own = found.get("pos_embed"), vit.pos_embed
    if positions is None or own is None or positions.ndim != 3 or positions.shape[1:] == own.shape[1:]:
        return None
    patches = positions.shape[1] - (0 if vit.no_embed_class else vit.num_prefix_tokens)
    short = next((side for side in range(isqrt(max(patches, 0)), 1, -1) if patches % side == 0), None)
    if short is None:
        return None
    height, width = cast(tuple[int, int], vit.patch_embed.patch_size)
    sides = ((short, patches // short), (patches // short, short))
    return "   or   ".join(f"--img_size [{rows * height},{columns * width}]" for rows, columns in sides)

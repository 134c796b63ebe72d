"""A tokenizer in one file: safetensors, with what builds it again in the header."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mim.errors import UserError
from mim.program import called
from mim.tokenizers.base import Tokenizer
from mim.tokenizers.convolutional import ConvTokenizer
from mim.tokenizers.patches import PatchTokenizer
from mim.tokenizers.vqgan import VQGANTokenizer

BUILT_IN = "builtin"
"""Name of the tokenizer that comes with the package: 256 patches of 4 px out of the built-in photos."""
_KEY = "mim_tokenizer"
_KINDS: dict[str, type[Tokenizer]] = {kind.kind: kind for kind in (PatchTokenizer, ConvTokenizer, VQGANTokenizer)}


def build_tokenizer(kind: str, codes: int, stride: int) -> Tokenizer:
    """A tokenizer with everything to learn; ``kind`` is patches or convolutional."""
    return _KINDS[kind](codes=codes, stride=stride)


def save_tokenizer(tokenizer: Tokenizer, file: Path) -> None:
    """Writes weights and settings."""
    facts = json.dumps({"kind": tokenizer.kind} | tokenizer.settings())
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.state_dict().items()}
    save_file(tensors, file, metadata={_KEY: facts})


def is_tokenizer(name: str) -> bool:
    """Whether ``name`` is ``builtin`` or a file that :func:`save_tokenizer` wrote, rather than one of others."""
    try:
        with safe_open(Path(name).expanduser(), "pt") as opened:
            return _KEY in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return name == BUILT_IN


def load_tokenizer(name: str, option: str = "--tokenizer") -> Tokenizer:
    """The tokenizer in a file, or ``builtin``; frozen and in evaluation mode.

    Args:
        name: path of a file that :func:`save_tokenizer` wrote, or ``builtin``.
        option: what names it, for messages.

    Raises:
        UserError: if there is no such file, or it is none.
    """
    file = Path(__file__).with_name("builtin.safetensors") if name == BUILT_IN else Path(name).expanduser()
    hint = f"{option} {BUILT_IN}   or   {called('tokens')} fit --data IMAGES --out tokenizer.safetensors"
    if not file.is_file():
        raise UserError(f"{option} {name}: no such file", hint=hint)
    try:
        with safe_open(file, "pt") as opened:
            facts = json.loads((opened.metadata() or {})[_KEY])
            tokenizer = _KINDS[facts.pop("kind")](**facts)
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            if not all(tensor.isfinite().all() for tensor in weights.values()):
                raise ValueError("not finite")
            tokenizer.load_state_dict(weights)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        why = "it is none of those that this program has written"
        raise UserError(f"{option} {name} is no tokenizer", why=why, hint=hint) from error
    return tokenizer.freeze()

"""Weights in several files: Hugging Face's shards with an index, and the folders of DeepSpeed and torch.distributed."""

import json
import re
from pathlib import Path

from mim.errors import UserError
from mim.program import quoted

INDEX = ".index.json"
"""How the file ends that tells which tensor lies in which shard."""
_MODEL_STATES = "mp_rank_00_model_states.pt"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(?:safetensors|bin)")


def shards_of(index: Path, option: str) -> list[Path]:
    """The files that an index names, which all have to be there.

    Args:
        index: such as ``model.safetensors.index.json``.
        option: the command-line option that named the weights, for messages.

    Raises:
        UserError: if it is damaged, names files elsewhere, or one is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name or name.endswith(INDEX) for name in names):
            raise ValueError("it names no files of its own folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        reason = f"{problem}".partition("\n")[0][:200] or "it is no JSON that can be read"
        raise UserError(f"{option} {index} is not an index of shards", why=reason) from problem
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{option} {index.parent}: {len(missing)} of {len(names)} shards are missing",
            why=f"{index.name} names {missing[0]}, which is not there",
            hint=f"copy {' '.join(missing[:4])}{' ...' * (len(missing) > 4)} into {index.parent}",
        )
    return [index.parent / name for name in names]


def refuse_part(path: Path, option: str) -> None:
    """Refuses a file that holds only a part of the weights, and says what holds all of them.

    Raises:
        UserError: for a shard of several, a ZeRO-3 part, a model-parallel part or an optimizer's state.
    """
    if (shard := _SHARD.fullmatch(path.name)) and int(shard[3]) > 1:
        index = path.with_name(f"{shard[1]}{path.suffix}{INDEX}")
        raise UserError(
            f"{option} {path} is one of {int(shard[3])} shards of the weights",
            why=None if index.is_file() else f"{index.name}, which tells what lies where, is not beside it",
            hint=f"{option} {quoted(path.parent)}"
            if index.is_file()
            else f"copy {index.name} and all shards into {path.parent}",
        )
    if path.name.endswith("optim_states.pt"):
        raise UserError(
            f"{option} {path} holds the state of DeepSpeed's optimizer, not the weights",
            hint=f"{option} {quoted(path.parent)}",
        )
    if re.fullmatch(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", path.name):
        raise _zero_3(path.parent, option)
    if parts := _parts_beside(path):
        raise UserError(
            f"{option} {path} is one of {parts} model-parallel parts",
            why="DeepSpeed has cut every layer into as many pieces",
            hint="merge them with the program that wrote them, then name the merged file",
        )


def deepspeed_weights(folder: Path, option: str) -> Path | None:
    """The one file with all weights in a DeepSpeed checkpoint's folder; None if it is no such folder.

    Raises:
        UserError: if the weights are in parts.
    """
    for home in _tagged(folder):
        if (home / _MODEL_STATES).is_file():
            return home / _MODEL_STATES
        if any(home.glob("zero_pp_rank_*_model_states.pt")):
            raise _zero_3(home, option)
    if (folder / ".metadata").is_file() and any(folder.glob("*.distcp")):
        whole = folder.with_name(f"{folder.name}.pt")
        raise UserError(
            f"{option} {folder} is a sharded checkpoint of torch.distributed",
            why="its parts are put together by torch, which may run code from .metadata: only if you trust its author",
            hint=f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {quoted(folder, whole)}   then   "
            f"{option} {quoted(whole)}",
        )
    return None


def _tagged(folder: Path) -> list[Path]:
    """Where a DeepSpeed checkpoint may lie: what ``latest`` names, the folder itself, its last step."""
    try:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        tag = ""
    named = [folder / tag] if tag and Path(tag).name == tag else []
    steps = sorted(folder.glob("global_step*"), key=lambda step: (len(step.name), step.name), reverse=True)
    return [home for home in (*named, folder, *steps) if home.is_dir()]


def _zero_3(home: Path, option: str) -> UserError:
    root = next((place for place in (home, home.parent) if (place / "zero_to_fp32.py").is_file()), home.parent)
    whole = root / "whole"
    return UserError(
        f"{option} {home} holds the weights in parts (ZeRO-3 of DeepSpeed)",
        why="each file has a share of every tensor; the script that DeepSpeed puts beside them makes them whole",
        hint=f"python {quoted(root / 'zero_to_fp32.py', root, whole)}   then   {option} {quoted(whole)}",
    )


def _parts_beside(path: Path) -> int:
    """Model-parallel parts of which ``path`` is one; 0 if it is the only one, or none."""
    if not re.fullmatch(r"mp_rank_\d+_model_states\.pt", path.name):
        return 0
    parts = len(list(path.parent.glob("mp_rank_*_model_states.pt")))
    return parts if parts > 1 else 0

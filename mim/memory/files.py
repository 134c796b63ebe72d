"""Memory in and out: what lies beside the timm folder of the model that stands still."""

import json
from pathlib import Path
from typing import Any, cast

import timm
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from mim.errors import UserError
from mim.interop import add_checksums, check_timm_folder, load_weights, weights_in
from mim.memory.task import Task
from mim.memory.vit import MemoryViT
from mim.program import called, quoted

MEMORY, _WEIGHTS, _PREFIX = "memory.json", "memory.safetensors", "tasks."
_MOST = 10_000
"""More cells in a block than anybody learns."""


def holds_memory(folder: Path) -> bool:
    """Whether there is memory beside a model."""
    return (folder / MEMORY).is_file()


def save_memory(model: MemoryViT, folder: Path) -> None:
    """Writes ``memory.json`` and ``memory.safetensors``.

    Args:
        model: on the CPU.
        folder: a timm folder of ``model.vit``.
    """
    tasks = {
        name: {"classes": task.class_names, "cells": task.cells, "normed": task.normed}
        for name, task in cast(dict[str, Task], dict(model.tasks.items())).items()
    }
    tensors = {f"{_PREFIX}{name}": value.contiguous() for name, value in model.tasks.state_dict().items()}
    save_file(tensors, folder / _WEIGHTS)
    (folder / MEMORY).write_text(json.dumps({"tasks": tasks}, indent=2) + "\n", encoding="utf-8")
    add_checksums(folder, (_WEIGHTS, MEMORY))


def load_memory(folder: str | Path, option: str = "--weights") -> MemoryViT:
    """The frozen model of a folder with the memory of its tasks, in evaluation mode.

    Args:
        folder: the ``export`` of a fine-tuning with ``--memory``.
        option: that named the folder, for messages.

    Raises:
        UserError: if there is no memory, or it does not belong to the model.
    """
    home = Path(str(folder).removeprefix("local-dir:"))
    if not holds_memory(home):
        raise UserError(
            f"{option} {home} holds no memory", hint=f"{called('finetune')} --weights {quoted(home)} --memory 5"
        )
    check_timm_folder(home, option)
    vit: Any = timm.create_model(f"local-dir:{home}")
    try:
        vit.load_state_dict(load_weights(weights_in(home), option=option))
        model = MemoryViT(vit, _tasks(json.loads((home / MEMORY).read_text(encoding="utf-8"))["tasks"], vit))
        tensors = load_weights(home / _WEIGHTS, option=option)
        model.tasks.load_state_dict({name.removeprefix(_PREFIX): value for name, value in tensors.items()})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{option} {home}: its memory does not belong to its model", why=why) from error
    return model.eval()


def _tasks(listed: dict[str, dict[str, Any]], vit: VisionTransformer) -> dict[str, Task]:
    for name, task in listed.items():
        if not 0 <= int(task["cells"]) <= _MOST:
            raise ValueError(f"task {name} asks for {task['cells']} cells")
    return {
        name: Task(vit, int(task["cells"]), list(map(str, task["classes"])), normed=bool(task["normed"]))
        for name, task in listed.items()
    }

"""What went wrong with the machine, not with the code, in the words of its user."""

import torch

from mim.data.loading import loader_failure
from mim.errors import MachineError


def as_machine_error(
    error: Exception,
    *,
    at: str = "",
    memory_hint: str = "a smaller --batch_size or --img_size, fewer --num_workers",
    loader_hint: str = "fewer --num_workers, if memory was short",
) -> MachineError | None:
    """The three lines for memory that ran out and for loader processes that died or hung; None for any other error.

    Args:
        error: what was raised.
        at: the sizes that memory ran out with.
        memory_hint: what to try if memory ran out.
        loader_hint: what to try after a loader process died or hung.
    """
    if out_of_memory(error):
        why = next((part for part in str(error).split(". ") if "allocate" in part.lower()), None)
        return MachineError(f"out of memory{at}", why=why, hint=memory_hint, alone=True)
    return loader_failure(error, loader_hint)


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of a GPU or of the machine; the latter is a plain error to torch."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)

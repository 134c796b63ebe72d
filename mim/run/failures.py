"""What went wrong with the machine or the numbers, not with the code, in the words of its user."""

import signal
import subprocess
from contextlib import suppress

import torch
from lightning import Trainer

from mim.data.loading import loader_failure
from mim.errors import DivergedError, MachineError
from mim.methods import NonFiniteError
from mim.program import called
from mim.run.checkpoint_files import newest_good
from mim.run.folder import RunFolder


def as_machine_error(
    error: Exception,
    *,
    at: str = "",
    memory_hint: str = "a smaller --batch_size or --img_size, fewer --num_workers",
    loader_hint: str | None = None,
) -> MachineError | None:
    """The three lines for memory that ran out and for loader processes that failed; None for any other error.

    Args:
        error: what was raised.
        at: the sizes that memory ran out with.
        memory_hint: what to try if memory ran out.
        loader_hint: what to try after a loader process died, hung or found no image.
    """
    if out_of_memory(error):
        why = next((part for part in str(error).split(". ") if "allocate" in part.lower()), None)
        return MachineError(f"out of memory{at}", why=why, hint=memory_hint, alone=True)
    return loader_failure(error, loader_hint)


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of a GPU or of the machine; the latter is a plain error to torch."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def diverged(error: NonFiniteError, folder: RunFolder, precision: str) -> DivergedError:
    """What to tell of numbers that are not finite."""
    last, _ = newest_good(folder.checkpoints)
    dump = folder.nan_dump(error.step)
    kept = f"are in {dump}" if dump.exists() else f"could not be written to {dump}"
    return DivergedError(
        f"{error}; the optimizer skipped the step",
        why=f"batch ({', '.join(error.names[:3])}, ...), seed and weights {kept}; "
        f"last good checkpoint: {last or 'none yet'}",
        hint=("" if precision == "32-true" else "--precision 32-true   or   ")
        + "a lower --blr   or   --trainer.gradient_clip_val 1.0",
    )


def lost_process(trainer: Trainer, folder: RunFolder) -> MachineError | None:
    """Names a rank that this process started and that died: the backend itself reports a closed connection only."""
    for rank, process in enumerate(getattr(trainer.strategy.launcher, "procs", []), start=1):
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(timeout=2)  # it may still be writing its own error
            if status == 0:
                continue
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            return MachineError(
                f"process {rank} of {trainer.world_size} died ({how}), so all others were stopped",
                why="look above for its own error; if there is none, it was probably killed for lack of memory",
                hint=f"{called('pretrain')} --resume {folder.path}",
            )
    return None


def failure_of_a_step(
    error: Exception, trainer: Trainer, folder: RunFolder, batch_size: int, num_workers: int
) -> MachineError | None:
    """Memory or a loader process, if it was one of them."""
    per_device = batch_size // trainer.world_size // trainer.accumulate_grad_batches
    accumulate = trainer.accumulate_grad_batches * 4
    return as_machine_error(
        error,
        at=f" at batch {per_device} per device",
        memory_hint=f"--accumulate {accumulate}   (same global batch and learning rate), --precision bf16-mixed, "
        "--model.init_args.encoder.grad_checkpointing true",
        loader_hint=f"{called('pretrain')} --resume {folder.path}   "
        f"(with --num_workers {num_workers // 2} if memory was short)",
    )

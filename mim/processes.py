"""Which of several processes this is, before anything is set up."""

import os


def process_rank() -> int:
    """Rank that torchrun, Lightning or SLURM gave to this process; 0 if it is alone."""
    given = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((int(rank) for rank in given if rank is not None), 0)

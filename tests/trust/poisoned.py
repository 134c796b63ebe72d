"""``pretrain`` of MAE, where the loss of the second of several processes is NaN in the third step."""

import sys

from mim.cli import main
from mim.methods import MAE

honest = MAE.training_step


def poisoned(self, batch, batch_idx):
    loss = honest(self, batch, batch_idx)
    return loss * float("nan") if (self.global_step, self.trainer.global_rank) == (2, 1) else loss


MAE.training_step = poisoned

if __name__ == "__main__":
    sys.exit(main("pretrain"))

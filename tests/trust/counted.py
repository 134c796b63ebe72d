"""``pretrain``, every process of which appends the images it loads, with their epoch, to the file ``$COUNTED``."""

import os
import sys

from mim.cli import main
from mim.data.crops import Crops

load = Crops.__getitem__


def note_and_load(self, key):
    epoch, index = key
    with open(os.environ["COUNTED"], "a") as file:  # one short write at the end of a file is whole
        file.write(f"{epoch} {self.source.describe(index)}\n")
    return load(self, key)


Crops.__getitem__ = note_and_load

if __name__ == "__main__":
    sys.exit(main("pretrain"))

"""The index of a large data set is in memory once, whether processes are forked or started."""

import os
import pickle
from multiprocessing import context
from multiprocessing.popen_spawn_posix import _DupFd
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from mim.data.flat import FlatArray, FlatLabels, Labels
from mim.data.sources import ListSource
from mim.data.tables import Table


class Started:
    """The part of a process that is being started which pickles are made for."""

    DupFd = _DupFd
    duplicate_for_child = staticmethod(os.dup)


def sent(value):
    """What a process that is being started gets, pickled."""
    context.set_spawning_popen(Started)
    try:
        return pickle.dumps(value)
    finally:
        context.set_spawning_popen(None)


def listed(count):
    """A list of so many images of seven classes."""
    paths = [f"photos/class-{number % 7}/image-é-{number:040}.jpg" for number in range(count)]
    return ListSource(Path("list.csv"), 3, Table(paths, [f"{number % 7}" for number in range(count)]))


def names(source):
    return [source.describe(index) for index in range(0, len(source), 97)]


def test_a_process_is_sent_no_index_however_many_images_there_are():
    assert len(sent(listed(30_000))) < len(sent(listed(10))) + 1000
    assert len(pickle.dumps(listed(30_000))) > 30_000 * 60


def test_a_process_that_was_started_reads_the_same_names_and_labels_in_the_same_order():
    source = listed(30_000)
    there = pickle.loads(sent(source))
    assert names(there) == names(source)
    assert list(there.labels) == source.labels
    assert there.labels[29_999] == 29_999 % 7
    assert isinstance(there.labels, FlatLabels)


def test_every_process_gets_a_file_of_its_own_handle():
    values = FlatArray(np.arange(20_000))
    first, second = (pickle.loads(sent(values)) for _ in range(2))
    del first
    assert np.array_equal(second, values)


@pytest.mark.parametrize("values", [FlatArray(np.arange(12).reshape(3, 4)), Labels([1, 2])])
def test_a_copy_is_of_the_same_kind_and_holds_its_numbers(values):
    copied = pickle.loads(pickle.dumps(values))
    assert type(copied) is type(values)
    assert np.array_equal(copied, values)


def test_a_part_of_an_array_is_sent_alone():
    values = FlatArray(np.arange(40_000))
    sent(values)
    part = values[::2]
    assert np.array_equal(pickle.loads(sent(part)), np.arange(0, 40_000, 2))


class Touching(Dataset):
    """Memory, in KiB, that a process has to itself and wrote to, once it has looked at a tenth of names and labels."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 1

    def __getitem__(self, index):
        for place in range(0, len(self.source), 10):
            assert self.source.labels[place] == place % 7
            assert self.source.describe(place)
        return sum(private_of_no_file())


def private_of_no_file():
    """KiB of each mapping; pages of a file that is not on the disk yet are dirty, too, whoever wrote them."""
    inode = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            inode = values[3]
        elif name == "Private_Dirty:" and inode == "0":
            yield int(values[0])


@pytest.mark.middle
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_loader_process_holds_no_index_of_its_own(how):
    small, large = (
        DataLoader(Touching(listed(count)), num_workers=1, multiprocessing_context=how) for count in (70, 300_000)
    )
    held, more = (next(iter(loader)).item() for loader in (small, large))
    assert more - held < 4096  # of 20 MiB of names

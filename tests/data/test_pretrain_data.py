"""Images for pretraining: the same crop for a key anywhere, unreadable files replaced, counted and named once."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from mim.data.bad_files import BadFiles, BadFileWarning
from mim.data.crops import Centers, Crops, collate
from mim.data.images import ImageError
from mim.data.pixels import EIGHT_BIT
from mim.data.pretrain import PretrainData
from mim.data.views import SingleView
from mim.errors import UserError
from mim.randomness import RowGenerator, derive_seed
from mim.run.failures import as_machine_error


class FakeSource:
    """Images of noise, their index in every corner; ``bad`` ones cannot be read."""

    name, classes = "fake", ["even", "odd"]

    def __init__(self, count=20, bad=(), labelled=True):
        self.count, self.bad = count, set(bad)
        self.labels = [index % 2 for index in range(count)] if labelled else None

    def __len__(self):
        return self.count

    def describe(self, index):
        return f"{index}.jpg"

    def read(self, index):
        if index in self.bad:
            raise ImageError(self.describe(index), "truncated")
        generator = torch.Generator().manual_seed(index)
        return torch.randint(256, (3, 24, 30 + index), dtype=torch.uint8, generator=generator)


def crops(seed=0, views=None, **source):
    if views is None:
        views = SingleView()
        views.configure((16, 16), [0.5] * 3, [0.25] * 3, EIGHT_BIT)
    return Crops(FakeSource(**source), views, seed)


def opened(batch_size=4, max_bad=0.01, **source):
    """A data module with a fake source, as ``open`` leaves it."""
    data = PretrainData("shapes", batch_size=batch_size, num_workers=0, max_bad=max_bad)
    data.source, data.evaluation, data.seed = FakeSource(**source), None, 0
    data.mean, data.std = data.statistics(3)
    data.views.configure((16, 16), data.mean, data.std, EIGHT_BIT)
    data.bad_files.total = len(data.source)
    return data


def attach(data, rank=0, world_size=1, accumulate=1, max_steps=6):
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        accumulate_grad_batches=accumulate,
        max_steps=max_steps,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


# Crops ---------------------------------------------------------------------------------------------------------------


def test_a_crop_is_a_function_of_epoch_and_index():
    dataset = crops()
    first = dataset[0, 3][0][0]
    torch.rand(5), dataset[0, 4]
    assert torch.equal(dataset[0, 3][0][0], first)
    others = [dataset[1, 3], crops(seed=1)[0, 3]]
    assert not any(torch.equal(views[0], first) for views, *_ in others)


def test_a_crop_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    _ = crops()[0, 3]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_worker_cuts_the_crops_of_the_main_process(start):
    dataset, keys = crops(), [[(0, 1), (0, 2)], [(1, 1), (3, 19)]]
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=2, collate_fn=collate, multiprocessing_context=start)
    for batch, (views, *_) in zip(keys, loader, strict=True):
        assert torch.equal(views[0], torch.stack([dataset[key][0][0] for key in batch]))


def test_no_crop_is_drawn_twice():
    class Draw(SingleView):
        def crop(self, image):
            return [torch.rand(4)]

    dataset = crops(views=Draw(), count=200)
    draws = torch.stack([dataset[epoch, index][0][0] for epoch in range(3) for index in range(200)])
    assert len(draws.unique(dim=0)) == 600


def test_the_label_is_minus_one_where_there_is_none():
    assert crops()[0, 3][1] == 1
    assert crops(labelled=False)[0, 3][1] == -1


def test_an_unreadable_image_is_replaced_by_a_keyed_other_and_named():
    broken, whole = crops(bad=[3]), crops()
    views, label, _, bad = broken[0, 3]
    assert bad == [("3.jpg", "truncated")]
    assert views[0].shape == (3, 16, 16)
    again = broken[0, 3]
    assert torch.equal(again[0][0], views[0])
    assert again[1] == label
    assert torch.equal(broken[0, 4][0][0], whole[0, 4][0][0])  # the others are what they would have been


def test_a_substitute_changes_from_epoch_to_epoch():
    labels = [crops(bad=[3])[epoch, 3][1] for epoch in range(20)]
    assert set(labels) == {0, 1}


def test_a_substitute_that_is_unreadable_is_replaced_and_named_too():
    _, label, _, bad = crops(count=3, bad=[0, 1])[0, 0]
    assert label == 0  # of the only good image, 2
    assert {name for name, _ in bad} <= {"0.jpg", "1.jpg"}
    assert bad[0] == ("0.jpg", "truncated")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_any_good_image_does_not_search_for_ever(workers):
    with pytest.raises(RuntimeError) as stop:
        next(iter(DataLoader(crops(count=3, bad=[0, 1, 2]), batch_sampler=[[(0, 0)]], num_workers=workers)))
    assert as_machine_error(stop.value).hint == "the same command once they can be read"
    found = as_machine_error(stop.value, loader_hint="again")
    assert found.error.startswith("100 images in a row cannot be read, last ")
    assert len(str(found).splitlines()) == 3


def test_collate_joins_views_labels_and_bad_files():
    views, labels, keys, bad = collate([crops(bad=[3])[0, 3], crops()[0, 5]])
    assert [tuple(view.shape) for view in views] == [(2, 3, 16, 16)]
    assert labels[1] == 1
    assert keys.tolist() == [derive_seed(0, "augment", 0, index) for index in (3, 5)]
    assert bad == [("3.jpg", "truncated")]


# Bad files -----------------------------------------------------------------------------------------------------------


def mention_twice(files):
    for _ in range(2):
        files.add(("a.jpg", "truncated"))


def test_a_bad_file_is_named_once_and_written_once(tmp_path):
    files = BadFiles(0.5, "photos")
    files.total = 10
    files.write_to(tmp_path / "bad_files.txt")
    with pytest.warns(BadFileWarning, match=r"a\.jpg cannot be read \(truncated\)") as warned:
        mention_twice(files)
    assert len(warned) == 1
    assert (tmp_path / "bad_files.txt").read_text() == "a.jpg\ttruncated\n"


def test_files_found_before_there_is_a_folder_are_written_when_there_is_one(tmp_path):
    files = BadFiles(0.5, "photos")
    with pytest.warns(BadFileWarning):
        files.add(("a.jpg", "truncated"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was printed when it was found
        files.write_to(tmp_path / "bad_files.txt")
    assert (tmp_path / "bad_files.txt").read_text() == "a.jpg\ttruncated\n"


def test_a_resumed_run_counts_the_files_it_knew(tmp_path):
    log = tmp_path / "bad_files.txt"
    log.write_text("a.jpg\ttruncated\nb.jpg\tempty file\n")
    files = BadFiles(0.1, "photos")
    files.total = 10
    files.write_to(log)
    files.add(("a.jpg", "truncated"))  # no warning: it is known
    assert log.read_text().count("a.jpg") == 1
    with pytest.raises(UserError):
        files.stop_if_too_many()


@pytest.mark.filterwarnings("ignore::mim.data.bad_files.BadFileWarning")
def test_the_limit_itself_is_tolerated_and_one_more_stops_the_run():
    files = BadFiles(0.01, "my photos")
    files.total = 200
    files.add(("a.jpg", "truncated"), ("b.jpg", "empty file"))
    files.stop_if_too_many()
    files.add(("c.jpg", "truncated"))
    with pytest.raises(UserError, match="3 of 200 images are unreadable") as stop:
        files.stop_if_too_many()
    assert stop.value.why == "first: a.jpg (truncated), b.jpg (empty file), c.jpg (truncated)"
    assert "check_data --data 'my photos' --fix good.csv" in stop.value.hint


@pytest.mark.filterwarnings("ignore::mim.data.bad_files.BadFileWarning")
def test_the_bad_files_of_a_batch_are_noted_and_judged_after_its_step():
    data = opened(max_bad=0)
    batch = [torch.zeros(1)], torch.zeros(1), torch.arange(1), [("1.jpg", "truncated")]
    assert data.on_before_batch_transfer(batch, 0)[:2] == batch[:2]
    assert data.bad_files.too_many()


# The module ----------------------------------------------------------------------------------------------------------


def test_the_loader_starts_at_the_first_step_and_ends_with_the_last():
    whole = list(attach(opened()).train_dataloader())
    data = attach(opened())
    data.first_step = 4
    tail = list(data.train_dataloader())
    assert (len(whole), len(tail)) == (6, 2)
    for (views, *_), (expected, *_) in zip(tail, whole[4:], strict=True):
        assert torch.equal(views[0], expected[0])


def test_ranks_and_micro_batches_load_the_global_batch():
    whole = [views[0] for views, *_ in attach(opened()).train_dataloader()]
    parts = [
        [views[0] for views, *_ in attach(opened(), rank, world_size=2, accumulate=2).train_dataloader()]
        for rank in range(2)
    ]
    for step, images in enumerate(whole):
        micro_batches = [parts[rank][2 * step + micro] for micro in range(2) for rank in range(2)]
        assert torch.equal(torch.cat(micro_batches), images)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_processes_and_their_workers_draw_nothing_twice_and_together_what_one_draws():
    """A thousand images for three epochs: crops in four workers of each of two processes, and numbers for masks."""

    class Draw(SingleView):
        def crop(self, image):
            return [torch.rand(4)]

    def draws(world_size, workers):
        found = []
        for rank in range(world_size):
            data = attach(opened(batch_size=50, count=1000), rank, world_size, max_steps=60)
            data.views, data.num_workers, rows = Draw(), workers, 50 // world_size
            for step, (views, _, keys, _) in enumerate(data.train_dataloader()):
                masks = RowGenerator.for_rows(derive_seed(0, "rows", step), rank * rows, rows).rand(4)
                colours = RowGenerator(keys).rand(4)
                found += [(step, rank, *row.tolist()) for row in torch.cat([views[0], masks, colours], 1)]
        return torch.tensor([numbers for _, _, *numbers in sorted(found, key=lambda row: row[:2])], dtype=torch.float64)

    one, two = draws(1, 0), draws(2, 4)
    assert torch.equal(one, two)
    for kind in one.split(4, dim=1):
        assert len(kind.unique(dim=0)) == 3000


def test_the_batch_of_a_step_can_be_looked_at_later():
    data = attach(opened(bad=[3]))
    batches = [(data.views(v, RowGenerator(keys))[0], labels) for v, labels, keys, _ in data.train_dataloader()]
    (images,), labels, names, _ = data.batch(2)
    assert torch.equal(images, batches[2][0])
    assert torch.equal(labels, batches[2][1])
    asked = [f"{index}.jpg" for _, index in data.sampler(range(0)).keys(2)]
    assert [(name, other) for name, other in zip(asked, names, strict=True) if name != other] == [("3.jpg", "10.jpg")]


def test_lightning_sees_a_loader_without_a_length():
    with pytest.raises(TypeError):
        len(attach(opened()).train_dataloader())


def test_centers_leave_unreadable_images_out():
    data = opened(bad=[2, 5])
    batches = list(data.center_batches(data.source, [1, 2, 3, 5], batch_size=2))
    assert [labels.tolist() for _, labels in batches] == [[1], [1]]
    torch.testing.assert_close(batches[0][0][0], data.views.normalize(data.views.center(data.source.read(1))[None])[0])


def test_a_batch_of_unreadable_centers_is_passed_over():
    data = opened(bad=[0, 1])
    assert [len(images) for images, _ in data.center_batches(data.source, [0, 1, 2], batch_size=2)] == [1]


def test_centers_are_as_many_as_asked_for():
    assert len(Centers(FakeSource(), SingleView(), [4, 4, 7])) == 3


@pytest.mark.filterwarnings("ignore::mim.data.bad_files.BadFileWarning")
def test_the_check_reads_images_spread_over_the_set_and_reports_the_smallest_size():
    data = opened(bad=[0], max_bad=0.2, count=40)
    assert data.check(sample=10) == (10, (34, 24))  # 0, 4, 8 ...; 0 is unreadable, 4 is the narrowest
    assert list(data.bad_files.reasons) == ["0.jpg"]


@pytest.mark.filterwarnings("ignore::mim.data.bad_files.BadFileWarning")
def test_the_check_stops_a_run_on_a_set_of_rubbish():
    with pytest.raises(UserError, match="10 of 10 images are unreadable"):
        opened(bad=range(40), count=40).check(sample=10)


@pytest.mark.filterwarnings("ignore::mim.data.bad_files.BadFileWarning")
def test_a_set_without_a_readable_image_is_refused_whatever_the_limit():
    with pytest.raises(UserError, match="none of the first 10 images can be read"):
        opened(bad=range(40), count=40, max_bad=1.0).check(sample=10)


def test_statistics_are_imagenets_for_colour_and_plain_otherwise():
    assert PretrainData().statistics(3)[0] == [0.485, 0.456, 0.406]
    assert PretrainData().statistics(1) == ([0.5], [0.25])
    assert PretrainData(mean=[0.1], std=[0.2]).statistics(1) == ([0.1], [0.2])

"""What a GPU alone can show: steps that wait for nothing, the numbers of a CPU, exact repetition."""

import copy
import subprocess
import sys

import pytest
import torch
from recipes import ROOT, SETTINGS

from mim.benchmark.training import Contender, build, noise
from mim.distributed.devices import best_precision, send
from mim.encoder import Encoder
from mim.evaluation.knn import nearest
from mim.layers.teacher import Teacher
from mim.options.pretraining import translate
from mim.randomness import RowGenerator
from mim.run.config import instantiate, parse
from mim.vit import compile_blocks

pytestmark = pytest.mark.gpu
every_recipe = pytest.mark.parametrize("name", SETTINGS)


@pytest.fixture(autouse=True)
def _paths_start_at_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def contender(name, device, precision="bf16-mixed"):
    config = parse(translate([*SETTINGS[name], "--batch_size=4"]))
    return Contender(name, *build(config, device), precision)


@every_recipe
def test_twenty_steps_from_pinned_views_to_the_teacher_wait_for_nothing(name, device):
    objects = instantiate(parse(translate([*SETTINGS[name], "--batch_size=4"])))
    data, method = objects.data, objects.model.to(device)
    views, labels, keys = noise(data, method)
    data.views.to(device)
    own = Contender(name, method, (views, labels), "bf16-mixed")

    def steps(count):
        for number in range(count):
            batch = data.views([send(view, device) for view in views], RowGenerator(keys)), send(labels, device)
            method.on_train_batch_start(batch, number)
            own.issue(batch)

    steps(2)
    try:
        torch.cuda.set_sync_debug_mode("error")
        steps(20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(method.nonfinite_step) == -1


@every_recipe
def test_the_loss_of_a_step_in_bf16_is_that_in_float32_to_two_percent(name, device):
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        own = contender(name, device, precision)
        torch.manual_seed(0)
        with own.autocast():
            losses.append(own.loss(own.method, own.batch))
    assert {loss.dtype for loss in losses} == {torch.float32}
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["mae", "ibot", "hpm"])
def test_a_step_repeated_gives_the_same_weights_to_the_bit(name, device):
    states = []
    for _ in range(2):
        own = contender(name, device)
        for number in range(3):
            own.method.on_train_batch_start(own.batch, number)
            own.issue(own.batch)
        states.append(own.method.state_dict())
    assert [key for key, value in states[0].items() if not torch.equal(value, states[1][key])] == []


def test_a_gradient_that_is_not_finite_leaves_weights_and_teacher_as_they_are(device):
    own = contender("ibot", device)
    before = copy.deepcopy(own.method.state_dict())
    own.loss = lambda method, batch: method.training_step(batch, 0) * float("nan")
    own.issue(own.batch)
    after = own.method.state_dict()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    assert int(own.method.nonfinite_step) == 0


def test_compiled_blocks_compute_what_blocks_do(device):
    own = contender("mae", device, "32-true")
    own.method.eval()  # what drops paths would draw other numbers
    with torch.no_grad():
        torch.manual_seed(0)
        plain = own.loss(own.method, own.batch)
        compile_blocks(own.method)
        torch.manual_seed(0)
        torch.testing.assert_close(own.loss(own.method, own.batch), plain, rtol=1e-4, atol=1e-5)


def test_a_teacher_averages_there_as_on_a_cpu(device):
    student = Encoder("test_vit", img_size=32, patch_size=8)
    there, here = Teacher(copy.deepcopy(student).to(device)), Teacher(student)
    there.to(device)
    for teacher in (there, here):
        (own,) = teacher._student
        with torch.no_grad():
            for parameter in own.parameters():
                parameter += 1.0
        place = next(own.parameters()).device
        teacher.update(0.9, unless=torch.tensor(False, device=place))
    for (name, value), other in zip(there.module.state_dict().items(), here.module.state_dict().values(), strict=True):
        torch.testing.assert_close(value.cpu(), other, msg=name)


def test_neighbours_are_those_that_a_cpu_finds(device):
    torch.manual_seed(0)
    bank, labels = torch.nn.functional.normalize(torch.randn(500, 16), dim=1), torch.arange(500) % 7
    queries = torch.nn.functional.normalize(torch.randn(40, 16), dim=1)
    similarity, answers = nearest(bank.to(device), labels.to(device), queries.to(device), 5)
    expected, classes = nearest(bank, labels, queries, 5)
    torch.testing.assert_close(similarity.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert (answers.cpu() == classes).float().mean() > 0.98  # equal neighbours may change places


def test_views_are_coloured_there_as_on_a_cpu(device):
    finished = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        objects = instantiate(parse(translate([*SETTINGS["ibot"], "--batch_size=4"])))
        views, _, keys = noise(objects.data, objects.model)
        finished.append(objects.data.views.to(place)([view.to(place) for view in views], RowGenerator(keys)))
    for here, there in zip(*finished, strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)


def test_bf16_is_chosen_where_the_gpu_has_it(device):
    assert best_precision(True) == ("bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true")


@pytest.mark.parametrize("name", ["mae", "attmask"])
def test_a_run_trains_to_its_export(name, device, tmp_path):
    command = [sys.executable, "-m", "mim", "pretrain", *SETTINGS[name], "--epochs", "0.05", f"--out={tmp_path}/run"]
    done = subprocess.run([*command, "--trainer.accelerator=gpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "export" / "backbone" / "model.safetensors").is_file()

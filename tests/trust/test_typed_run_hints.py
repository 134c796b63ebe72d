"""What stands behind ``try:`` of refused runs and evaluations is typed: the mistake does not come back."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_situations import TYPED
from situations import KNN, RUN, TINY, image

from mim.cli import main
from mim.run.checkpoint_files import sidecar

OLD_RUN = Path(__file__).parents[1] / "old_run" / "mae"

pytestmark = [pytest.mark.middle, pytest.mark.usefixtures("quick_probes")]


@pytest.fixture
def work(tmp_path, monkeypatch, weights):
    """A working folder with photos, a link to an encoder and odd configs."""
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        image(f"photos/{number}.png")
        image(f"labelled/{number % 2}/{number}.png")
    for link in ("backbone", "tuned/export"):
        Path(link).parent.mkdir(exist_ok=True)
        Path(link).symlink_to(weights)
    tiny = Path(TINY).read_text()
    for name, text in {
        "cross": tiny.replace("decoder_depth: 1", "decoder_depth: 1\n    cross: {predicted: 0.5, mixed: 1}"),
        "init": f"init: {weights}\n",
        "large": "# " + "x" * 2**21,
        "deep": "model: " + "[" * 200 + "]" * 200,
        "broken": "model: [",
        "plugin": "plugin: my_package\n",
    }.items():
        Path(f"{name}.yaml").write_text(text)
    Path("my_package.py").write_text("")
    shutil.copytree(OLD_RUN, "runs/001-mae")
    shutil.copytree(OLD_RUN, "unfinished", ignore=shutil.ignore_patterns("export", "evaluation"))
    facts = json.loads(Path("unfinished/summary.json").read_text())
    Path("unfinished/summary.json").write_text(json.dumps(facts | {"status": "interrupted", "images": 7}))
    config = Path(shutil.copytree(OLD_RUN, "damaged"), "export", "backbone", "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pixels": {"low": "x"}}))
    checkpoint = next(Path("unfinished/checkpoints").glob("step-*.ckpt"))
    for file in (checkpoint, sidecar(checkpoint)):
        shutil.copy(file, str(file).replace(checkpoint.stem, "step-99999999"))
    with Path("unfinished/checkpoints/step-99999999.ckpt").open("ab") as file:
        file.write(b"!")
    return weights


@pytest.mark.parametrize("call", TYPED.values(), ids=TYPED)
def test_what_is_refused_before_the_work_is_not_refused_again(call, work, typist):
    command, *args = [work if word == "WEIGHTS" else word for word in call]
    assert main(command, args) == 2
    typist.type_all()


def test_features_too_large_for_the_disk_fit_as_proposed(work, monkeypatch, typist):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=20_000))
    assert main("features", ["--weights", work, "--data", "photos", "--num_workers", "0", "--device", "cpu"]) == 2
    typist.type_all()


@pytest.mark.parametrize("call", [RUN, [*KNN, "--data", "labelled", "--cache", "cache"]], ids=["pretrain", "knn"])
def test_a_file_in_the_place_of_runs_is_not_in_the_way_again(call, work, typist):
    shutil.rmtree("runs")
    Path("runs").write_text("")
    command, *args = [work if word == "WEIGHTS" else word for word in call]
    assert main(command, args) == 2
    typist.type_all()


def test_another_folder_than_one_that_takes_no_files_is_used(work, monkeypatch, typist):
    def touch(path, *_, _touch=Path.touch):
        return no_space() if path.parent.name == "full" else _touch(path)

    monkeypatch.setattr(Path, "touch", touch)
    assert main("pretrain", [*RUN[1:], "--out", "full"]) == 2
    typist.type_all()


@pytest.mark.parametrize("full", ["mim.run.folder.RunFolder.say", "mim.run.checkpoint_files._HashingWriter.take"])
def test_a_run_that_a_full_disk_ended_goes_on_as_proposed(full, work, typist):
    summary = Path("unfinished/summary.json")
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"images": 1024}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full, no_space)
        assert main("pretrain", ["--resume", "unfinished"]) == 4
    typist.type_all()


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")

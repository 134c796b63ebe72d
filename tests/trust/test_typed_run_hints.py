"""What stands behind ``try:`` of refused runs and evaluations is typed: the mistake does not come back."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_situations import TYPED
from situations import KNN, RUN, TINY, image

from mim.cli import main
from mim.conv_encoder import ConvEncoder
from mim.encoder import Encoder
from mim.interop import ModelCard
from mim.memory import MemoryViT, Task, save_memory
from mim.run.checkpoint_files import sidecar
from mim.run.weights import export_backbone

NARROW = {"depth": 1, "embed_dim": 64, "num_heads": 2}
SHY = """
from mim.masking import RandomMasking

class Shy(RandomMasking):
    def visible_count(self, patches):
        return patches if self.ratio < 0.1 else super().visible_count(patches)
"""
SPARK = TINY.replace("tiny.yaml", "tiny_spark.yaml")
OLD_RUN = Path(__file__).parents[1] / "old_run" / "mae"

pytestmark = [pytest.mark.middle, pytest.mark.usefixtures("quick_probes")]


@pytest.fixture(scope="module")
def odd_weights(tmp_path_factory):
    """What not every command takes: no squares, a conv net, distilled, the norm behind the mean, biases, memory."""
    folder = tmp_path_factory.mktemp("odd")
    told = {"mean": [0.5] * 3, "std": [0.25] * 3, "card": ModelCard(method="MAE", data="shapes"), "model_args": {}}
    export_backbone(Encoder("test_vit", (32, 64), 8).vit, folder / "wide", **told)
    means = Encoder("test_vit", 32, 8, kwargs={"global_pool": "avg", "fc_norm": True}).vit
    export_backbone(means, folder / "means", **told)
    export_backbone(Encoder("deit_tiny_distilled_patch16_224", 32, 8, kwargs=NARROW).vit, folder / "distilled", **told)
    net = ConvEncoder("test_resnet", 64).vit
    net.reset_classifier(3)
    export_backbone(net, folder / "conv", **told)
    biased = Encoder("vit_small_patch16_dinov3_qkvb", 32, 8, kwargs=NARROW).vit
    biased.blocks[0].attn.q_bias.data += 1
    torch.save(biased.state_dict(), folder / "biased.pth")
    export_backbone(vit := Encoder("test_vit", 32, 8).vit, folder / "remembering", **told)
    save_memory(MemoryViT(vit, {"photos": Task(vit, 2, ["a", "b"])}), folder / "remembering")
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch, weights, odd_weights):
    """A working folder with photos, a link to an encoder and odd configs."""
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        image(f"photos/{number}.png")
        image(f"labelled/{number % 2}/{number}.png")
    for odd in odd_weights.iterdir():
        Path(odd.name).symlink_to(odd)
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
    Path("my_package.py").write_text(SHY)
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


IN_THE_WAY = {
    "pretrain": RUN,
    "knn": [*KNN, "--data", "labelled", "--cache", "cache"],
    "features": [*KNN, "--data", "labelled", "--out", "elsewhere", "--cache", "runs/features"],
}


@pytest.mark.parametrize("call", IN_THE_WAY.values(), ids=IN_THE_WAY)
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
    same_images("unfinished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full, no_space)
        assert main("pretrain", ["--resume", "unfinished"]) == 4
    typist.type_all()


def test_a_batch_that_the_devices_cannot_share_is_made_smaller(work, monkeypatch, typist):
    monkeypatch.setattr("mim.transfer.segmentation.open_trainer", lambda *_: SimpleNamespace(world_size=2))
    assert main("segment", ["--weights", work, "--batch_size", "3", "--device", "cpu", "--num_workers", "0"]) == 2
    typist.type_all()


@pytest.mark.usefixtures("work")
def test_statistics_over_processes_are_left_to_the_method(typist):
    def fit(pretraining, *_):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(pretraining.method).on_train_start()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mim.commands.pretrain.Pretraining._fit", fit)
        assert main("pretrain", ["--config", SPARK, "--trainer.sync_batchnorm", "true"]) == 2
    typist.type_all()


def test_a_run_whose_process_was_killed_goes_on_as_proposed(work, typist):
    def fit(_, trainer, checkpoint):
        trainer.strategy._launcher = SimpleNamespace(procs=[SimpleNamespace(wait=lambda timeout: -9)])
        raise RuntimeError("Connection closed by peer")

    same_images("unfinished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mim.commands.pretrain.Pretraining._fit", fit)
        assert main("pretrain", ["--resume", "unfinished"]) == 4
    typist.type_all()


@pytest.fixture
def drawing_run(work):
    """A run that predicts tokens, after its first step."""
    small = ["--model.init_args.encoder.kwargs", "{embed_dim: 32, depth: 1, num_heads: 2}", "--data", "photos"]
    changed = ["--batch_size", "2", "--epochs", "0.4", "--num_workers", "0", "--out", "drawing"]
    assert main("pretrain", ["--method", "maskgit", *small, *changed]) == 0


@pytest.mark.usefixtures("drawing_run")
def test_classes_that_a_run_does_not_know_are_left_out(typist):
    assert main("sample", ["--run", "drawing", "--classes", "3", "--count", "1", "--steps", "1"]) == 2
    typist.type_all()


def same_images(run):
    """The run began with as many as there are."""
    summary = Path(run, "summary.json")
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"images": 1024}))


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")

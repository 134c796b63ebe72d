"""mim from Python: the commands' names, checks and results; exceptions instead of exits; nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from strikes import checkpoints, differences
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_pil_image

import mim
from mim import api
from mim.cli import PRETRAIN
from mim.commands.make_shapes import run as make_shapes
from mim.data.shapes import ShapeSource
from mim.errors import InterruptedRunError, MachineError
from mim.evaluation.features import pooled_features

TINY = Path(__file__).parent / "tiny.yaml"
QUICK = {"config": TINY, "epochs": 2, "pictures": 1, "probe_images": 10, "eval_every": 5, "save_every": 0.5}


class Photos(Dataset):
    """Drawn images in memory; the fifth cannot be read."""

    strike = None
    """Item whose second reading sends a signal to this process."""

    def __init__(self, count=48):
        source = ShapeSource("train", count, 40)
        self.images = [source.read(index) for index in range(count)]
        self.targets, self.seen = [index % 3 for index in range(count)], 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == 4:
            raise ValueError("broken")
        if index == self.strike:
            self.seen += 1
            if self.seen == 2:  # the first time is the check before training
                os.kill(os.getpid(), signal.SIGINT)
        return self.images[index], self.targets[index]


@pytest.fixture(scope="module")
def photos():
    return Photos()


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos):
    """Six steps on a data set of Python."""
    torch.set_num_threads(1)
    return mim.pretrain(photos, out=tmp_path_factory.mktemp("runs") / "run", max_bad=0.1, num_workers=0, **QUICK)


def test_a_run_and_its_card_tell_the_call_of_python_and_not_the_program_around_it(run):
    call = (run.path / "command.txt").read_text().strip()
    assert call.startswith(f"mim.pretrain(config={str(TINY)!r}, data=test_api.Photos[48], out={str(run.path)!r}, ")
    assert call.endswith(", eval_every=5, save_every=0.5)")
    assert f"- Command: `{call}`" in (run.path / "export" / "backbone" / "README.md").read_text()


def test_importing_the_package_imports_neither_torch_nor_any_module_of_ours():
    ours = "[name for name in sys.modules if name.startswith('mim.')]"
    code = f"import sys, mim; print(len(sys.modules), 'torch' in sys.modules, {ours})"
    bare = "import sys; print(len(sys.modules))"
    counted, alone = (
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout.split(
            maxsplit=1
        )
        for text in (code, bare)
    )
    assert counted[1].strip() == "False []"
    assert int(counted[0]) - int(alone[0]) < 10


def test_everything_that_is_promised_is_there():
    assert set(mim.__all__) <= set(dir(mim))
    assert all(getattr(mim, name) is not None for name in mim.__all__)
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        _ = mim.pretrian


def test_options_are_those_of_the_command_line():
    named = {"data", "method", "resume", "plugin", "print_config", "help_all", "debug"}
    options = {
        name.rstrip("_") for name in typing.get_type_hints(api.PretrainOptions)
    }  # `continue` is a word of Python
    assert options == set(PRETRAIN) - named


# Pretraining ---------------------------------------------------------------------------------------------------------


def test_a_run_stands_for_its_folder(run):
    assert os.fspath(run) == str(run.path)
    assert run.report == run.path / "report.html"
    assert run.report.is_file()
    assert run.summary["status"] == "done"
    assert mim.Run(run.path) == run


def test_the_backbone_is_a_timm_model_with_the_trained_weights(run):
    vit = run.backbone(num_classes=3)
    trained = torch.load(checkpoints(run.path)[-1], weights_only=True)["state_dict"]
    assert torch.equal(vit.blocks[0].attn.qkv.weight, trained["encoder.vit.blocks.0.attn.qkv.weight"])
    assert vit.head.out_features == 3


def test_metrics_are_columns_of_one_length_with_gaps(run):
    metrics = run.metrics
    assert metrics["step"] == [0, 1, 2, 3, 4, 5, 6]
    assert {len(column) for column in metrics.values()} == {7}
    steps, losses = run.curve("train/loss")
    assert steps == [1, 2, 3, 4, 5, 6]
    assert losses == metrics["train/loss"][1:]
    assert run.curve("val/rankme")[0] == [0, 6]
    with pytest.raises(mim.UserError, match="has measured no loss"):
        run.curve("loss")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(mim.UserError, match="is no run"):
        mim.Run(tmp_path)


def test_a_data_set_is_named_in_the_run_and_its_labels_and_bad_items_count(run, photos):
    summary = run.summary
    assert summary["data"] == f"python:{__name__}.Photos[48]"
    assert (summary["images"], summary["classes"], summary["bad_files"]) == (48, 3, 1)
    assert (run.path / "bad_files.txt").read_text() == "Photos[4]\tValueError: broken\n"


def test_a_data_set_gives_the_weights_that_the_same_files_give(run, photos, tmp_path):
    for index, image in enumerate(photos.images):
        if index != 4:
            to_pil_image(image).save(tmp_path / f"{index}.png")
    (tmp_path / "4.png").write_bytes(b"broken")
    (tmp_path / "list.txt").write_text("\n".join(f"{index}.png" for index in range(48)))
    other = mim.pretrain(tmp_path / "list.txt", out=tmp_path / "run", max_bad=0.1, num_workers=2, **QUICK)
    weights = [torch.load(checkpoints(one.path)[-1], weights_only=True)["state_dict"] for one in (run, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_signal_is_an_exception_and_the_same_object_resumes_to_the_same_bits(run, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    interrupted = Photos()
    interrupted.strike = 7
    out = tmp_path / "run"
    with pytest.raises(InterruptedRunError) as error:
        mim.pretrain(interrupted, out=out, max_bad=0.1, num_workers=0, **QUICK)
    assert error.value.hint.startswith(f"mim.pretrain(resume='{out}')")
    assert mim.Run(out).summary["status"] == "interrupted"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert mim.pretrain(Photos(), resume=out).summary["status"] == "done"
    assert differences(run.path, out) == []


def test_another_object_is_refused_and_none_is_asked_for(run):
    with pytest.raises(mim.UserError, match=r"data\.path .*Photos\[48\] -> .*Photos\[47\]"):
        mim.pretrain(Photos(47), resume=run)
    with pytest.raises(mim.UserError, match=r"Photos\[48\] is an object of Python, which is not at hand"):
        mim.pretrain(resume=run)


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        ({"epoch": 3}, "there is no option --epoch", "--epochs 3"),
        ({"epochs": -3}, "--epochs cannot be -3", None),
        ({"epochs": "many"}, "--epochs cannot be many", None),
        ({"method": "mea"}, "--method mea: there is no such method", "--method mae"),
        ({"data": "nowhere_at_all"}, "--data nowhere_at_all: no such folder", None),
        ({"settings": {"model.init_args.decoder_dept": 3}}, "decoder_dept", None),
        ({"resume": "nowhere"}, "--resume nowhere: no run there", None),
        ({"plugin": "absent_parts"}, "--plugin absent_parts cannot be imported", None),
    ],
)
def test_a_mistake_is_the_exception_that_the_command_line_prints(options, error, hint):
    with pytest.raises(mim.UserError) as raised:
        mim.pretrain(**options)
    assert error in str(raised.value)
    assert hint is None or raised.value.hint == hint


def test_an_option_wins_over_the_config(tmp_path):
    run = mim.pretrain(
        "builtin", settings={"model.init_args.decoder_depth": 2}, out=tmp_path / "run", **QUICK | {"epochs": 0.02}
    )
    assert run.summary["data"] == "builtin"
    assert "decoder_depth: 2" in (run.path / "config.yaml").read_text()


def test_threads_and_random_numbers_are_as_they_were(run, photos, tmp_path):
    torch.set_num_threads(2)
    before, environment = torch.get_rng_state(), dict(os.environ)
    mim.pretrain(photos, out=tmp_path / "run", max_bad=0.1, num_workers=0, threads=1, **QUICK | {"epochs": 0.1})
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), before)
    assert dict(os.environ) == environment


def test_a_plugin_is_used_for_this_call_alone(tmp_path, monkeypatch, photos):
    (tmp_path / "own_parts.py").write_text(
        "from mim.masking import RandomMasking\n\n\nclass Own(RandomMasking):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    options = QUICK | {"epochs": 0.1, "settings": {"model.init_args.masking": "own_parts.Own"}, "max_bad": 0.1}
    run = mim.pretrain(photos, out="run", plugin="own_parts", num_workers=0, **options)
    assert "- own_parts" in (run.path / "config.yaml").read_text()
    with pytest.raises(mim.UserError) as raised:
        mim.pretrain(photos, out="again", num_workers=0, **options)
    assert raised.value.hint.startswith("--plugin own_parts ")


def test_a_hugging_face_data_set_resumes_to_the_same_bits(tmp_path):
    datasets = pytest.importorskip("datasets")
    photos = Photos(20)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [to_pil_image(image) for image in photos.images], "label": photos.targets}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "photos")

    whole = mim.pretrain(datasets.load_from_disk(tmp_path / "photos"), out=tmp_path / "whole", num_workers=1, **QUICK)
    assert (whole.summary["images"], whole.summary["classes"]) == (20, 3)
    shutil.copytree(whole.path, tmp_path / "half", symlinks=True)
    checkpoints(tmp_path / "half")[-1].unlink()
    mim.pretrain(datasets.load_from_disk(tmp_path / "photos"), resume=tmp_path / "half", num_workers=0)
    assert differences(whole.path, tmp_path / "half") == []


# Weights and features ------------------------------------------------------------------------------------------------


def test_an_encoder_comes_with_the_transform_of_its_images(run, photos):
    encoder, transform, note, pool = mim.load(run)
    image = transform(photos.images[0])
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert not encoder.training
    assert encoder(image[None]).shape == (1, 17, 64)
    assert note.startswith("78 of 78 tensors")
    assert pool == "mean"


def test_features_are_those_of_the_encoder_in_order_without_the_unreadable(run, photos):
    encoder, transform, *_ = mim.load(run)
    found = mim.features(run, photos, pool="mean", batch_size=5)
    images = torch.stack([transform(image) for index, image in enumerate(photos.images) if index != 4])
    with torch.no_grad():
        torch.testing.assert_close(found.vectors, pooled_features(encoder, images, "mean"))
        torch.testing.assert_close(found.patches, encoder.feature_map(images).permute(0, 2, 3, 1))
    assert found.patches.shape == (47, 4, 4, 64)
    assert found.names == [f"Photos[{index}]" for index in range(48) if index != 4]
    assert found.unreadable == {"Photos[4]": "ValueError: broken"}


@pytest.mark.parametrize(("options", "width"), [({"pool": "both"}, 128), ({"layers": 2}, 128), ({}, 64)])
def test_features_have_the_width_that_is_documented(run, photos, options, width):
    found = mim.features(mim.load(run), photos.images[:3], patch=False, **options)
    assert found.vectors.shape == (3, width)
    assert found.patches is None
    assert found.names == ["list[0]", "list[1]", "list[2]"]


def test_features_of_nothing_readable_are_refused(run, tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(mim.UserError, match="none of the 1 images can be read"):
        mim.features(run, tmp_path)


# Evaluations ---------------------------------------------------------------------------------------------------------

QUICKLY = {"max_bad": 0.1, "num_workers": 0, "val_fraction": 0.3}


def check_scores(scores, run, folder, *, seeds):
    assert all(set(by) == {"pretrained", "untrained"} for by in scores.values())
    assert all(len(values) == seeds and min(values) >= 0 for by in scores.values() for values in by.values())
    written = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert all(written[what] == by["pretrained"] for what, by in scores.items())


def test_knn_gives_the_scores_that_it_writes(run, photos, tmp_path):
    scores = mim.knn(run, photos, k=[1, 5], seeds=1, cache=tmp_path, **QUICKLY)
    assert list(scores) == ["1-NN top-1", "1-NN top-5", "5-NN top-1", "5-NN top-5"]
    check_scores(scores, run, run.path / "evaluation" / "knn", seeds=1)


def test_a_linear_probe_gives_the_scores_that_it_writes(run, photos, tmp_path):
    scores = mim.linear_probe(run, photos, epochs=1, lrs=[0.1], warmup_epochs=0, seeds=1, cache=tmp_path, **QUICKLY)
    assert list(scores) == ["top-1", "top-5"]
    check_scores(scores, run, run.path / "evaluation" / "linear", seeds=1)


def test_fine_tuning_gives_the_scores_that_it_writes(run, photos, tmp_path):
    scores = mim.finetune(run, photos, epochs=1, batch_size=16, out=tmp_path / "out", cache=tmp_path, **QUICKLY)
    check_scores(scores, run, tmp_path / "out", seeds=1)
    card = (tmp_path / "out" / "export" / "README.md").read_text()
    assert f"- Command: `mim.finetune(weights={str(run.path)!r}, data=test_api.Photos[48], epochs=1, " in card


def test_segmentation_gives_the_scores_that_it_writes(run, tmp_path):
    make_shapes(tmp_path / "shapes", train=10, val=5, size=32)
    scores = mim.segment(run, tmp_path / "shapes", steps=1, batch_size=2, pictures=0, out=tmp_path / "out")
    assert list(scores) == ["mIoU", "pixel accuracy"]
    check_scores(scores, run, tmp_path / "out", seeds=1)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda run: mim.knn("nowhere"), "--weights nowhere: no such file, folder or timm weights"),
        (lambda run: mim.knn(run, k=0), "--k cannot be 0"),
        (lambda run: mim.knn(run, kk=1), "there is no option --kk"),
        (lambda run: mim.linear_probe(run, batch_size=1), "--batch_size 1: the head normalises over a batch"),
        (lambda run: mim.finetune(run, batch_size=3), "--batch_size 3 does not give 1 equal parts"),
        (lambda run: mim.segment(run, head="knn", finetune=True), "--finetune: a k-NN head trains nothing"),
    ],
)
def test_a_mistake_in_an_evaluation_is_an_exception_too(run, call, error):
    with pytest.raises(mim.UserError) as raised:
        call(run)
    assert error in str(raised.value)


def test_exhausted_memory_is_told_as_such(run, monkeypatch):
    def exhausted(*args, **settings):
        raise MemoryError

    monkeypatch.setattr(api, "load_encoder", exhausted)
    with pytest.raises(MachineError, match="out of memory"):
        mim.load(run)

"""``tools/finetune.py``, driven as a user drives it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import mim
from mim.cli import main
from mim.encoder import Encoder
from mim.errors import UserError
from mim.interop import ModelCard, export_backbone
from mim.memory import MemoryViT, Task, save_memory

ROOT = Path(__file__).parents[2]
SHORT = [
    "--num_workers",
    "0",
    "--epochs",
    "4",
    "--warmup_epochs",
    "1",
    "--batch_size",
    "12",
    "--blr",
    "0.02",
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finetune(weights, photos, *args):
    return main("finetune", ["--weights", weights, "--data", str(photos), *SHORT, *map(str, args)])


def exported(folder):
    return load_file(Path(folder, "export", "model.safetensors"))


@pytest.mark.middle
def test_scores_stand_beside_training_from_scratch_and_timm_loads_the_classifier(weights, photos):
    assert finetune(weights, photos, "--seeds", 2, "--out", "result") == 0
    result = json.loads(Path("result/metrics.json").read_text())
    assert len(result["metrics"]["top-1"]) == len(result["metrics"]["top-1, untrained"]) == 2
    assert "layer decay 0.65" in result["protocol"]
    history = json.loads(Path("result/seed-0/history.json").read_text())
    assert history[-1]["epoch"] == 4
    assert not Path("result/seed-0/checkpoints").exists()
    with Image.open("result/confusion.png") as picture:
        assert picture.width > 100
    model = timm.create_model("local-dir:result/export", pretrained=True).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    card = Path("result/export/README.md").read_text()
    assert f"- Command: `python -m mim finetune --weights {weights} --data {photos} " in card


@pytest.mark.parametrize(
    "args",
    [
        ["--pool", "cls", "--ema", 0.9],
        ["--mixup", 0, "--cutmix", 0, "--auto_augment", "none", "--erase", 0],
        ["--accumulate", 3, "--tlm", 0.2],
    ],
    ids=lambda args: args[0].lstrip("-"),
)
def test_settings_train_to_the_end(weights, photos, args):
    assert finetune(weights, photos, *args, "--from_scratch", "false", "--out", "result") == 0
    assert "top-1, untrained" not in json.loads(Path("result/metrics.json").read_text())["metrics"]


def start(weights, photos, *args):
    command = [sys.executable, str(ROOT / "tools" / "finetune.py"), "--weights", weights, "--data", str(photos)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *SHORT, *map(str, args)], env=environment, **pipe)


@pytest.mark.middle
def test_a_stopped_training_goes_on_to_the_same_weights(weights, photos, stop_after_a_checkpoint):
    long = ["--epochs", 12, "--eval_every", 1, "--from_scratch", "false"]
    assert finetune(weights, photos, *long, "--out", "whole") == 0
    process = start(weights, photos, *long, "--out", "stopped")
    stop_after_a_checkpoint(process, "stopped")
    assert finetune(weights, photos, *long, "--out", "stopped", "--resume", "true") == 0
    whole, resumed = exported("whole"), exported("stopped")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_resuming_with_other_settings_is_refused(weights, photos, capsys):
    assert finetune(weights, photos, "--from_scratch", "false", "--out", "result") == 0
    assert finetune(weights, photos, "--blr", 0.5, "--out", "result", "--resume", "true") == 2
    assert "blr 0.02 -> 0.5" in capsys.readouterr().err


def test_a_setting_that_an_earlier_version_did_not_have_was_off(weights, photos, capsys):
    assert finetune(weights, photos, "--from_scratch", "false", "--epochs", 1, "--out", "result") == 0
    file = Path("result/settings.json")
    settings = json.loads(file.read_text())
    assert settings.pop("tlm") == 0
    file.write_text(json.dumps(settings))
    again = ["--from_scratch", "false", "--epochs", 1, "--out", "result", "--resume", "true"]
    assert finetune(weights, photos, *again) == 0
    assert finetune(weights, photos, *again, "--tlm", 0.1) == 2
    assert "tlm None -> 0.1" in capsys.readouterr().err


@pytest.mark.middle
def test_two_processes_equal_one_and_count_every_image_once(weights, photos):
    """15 images to score are 8 and 7. Sums are taken in another order: equal to rounding."""
    exact = ["--drop_path", 0, "--mixup", 0, "--cutmix", 0, "--from_scratch", "false"]
    assert finetune(weights, photos, *exact, "--out", "one") == 0
    process = start(weights, photos, *exact, "--out", "two", "--devices", 2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    one, two = (json.loads(Path(name, "seed-0", "history.json").read_text())[-1] for name in ("one", "two"))
    assert one["top1"] == two["top1"]
    assert round(15 * two["top1"]) == pytest.approx(15 * two["top1"])  # a share of 15, not of 16
    for name, value in exported("one").items():
        if not name.endswith("qkv.bias"):  # AdamW blows up the rounding errors of keys' biases, which change nothing
            torch.testing.assert_close(value, exported("two")[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_unreadable_image_is_named_and_judged(weights, photos, part, capsys):
    broken = min((photos / part / "arrow").iterdir())
    broken.write_bytes(broken.read_bytes()[:100])
    assert finetune(weights, photos, "--from_scratch", "false", "--max_bad", 0, "--out", "result") == 2
    text = capsys.readouterr().err
    assert "1 of 51 images are unreadable" in text
    assert str(broken) in text
    assert "(or --resume true --max_bad 0.05)" in text
    assert finetune(weights, photos, "--from_scratch", "false", "--max_bad", 0.1, "--out", "tolerant") == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_unreadable_image_of_any_process_stops_all(weights, photos, part):
    broken = max((photos / part / "cross").iterdir())
    broken.write_bytes(broken.read_bytes()[:100])
    once = ["--from_scratch", "false", "--devices", 2, "--out", "result"]
    process = start(weights, photos, *once, "--max_bad", 0)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert output.count("error: 1 of 51 images are unreadable") == 1
    assert str(broken) in output
    process = start(weights, photos, *once, "--max_bad", 0.1, "--resume", "true")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--batch_size", 13], "--batch_size 12"),
        (["--auto_augment", "nonsense"], "--auto_augment nonsense"),
        (["--epochs", 0], "--epochs"),
        (["--tlm", 0.1, "--reduction", "tome"], "error: --tlm 0.1 with --reduction tome"),
    ],
)
def test_mistakes_end_in_a_message(weights, photos, args, expected, capsys):
    assert finetune(weights, photos, *args) == 2
    assert expected in capsys.readouterr().err


def test_a_task_is_learned_by_memory_and_what_was_there_before_is_kept(weights, photos, capsys, tmp_path):
    """First a whole classifier, then two tasks: the encoder, its classifier and the first task stay as they were."""
    once = ["--from_scratch", "false", "--epochs", 1, "--warmup_epochs", 0]
    assert finetune(weights, photos, *once, "--out", "whole") == 0
    assert finetune("whole/export", photos, *once, "--memory", 5, "--out", "first") == 0
    capsys.readouterr()
    assert finetune("first/export", photos, *once, "--memory", 2, "--memory_norm", "false", "--out", "second") == 0
    assert capsys.readouterr().out.count(" predictions as before, largest difference") == 2
    kept = json.loads(Path("second/metrics.json").read_text())["metrics"]["kept"]
    assert kept.keys() == {"original", "photos"}
    for facts in kept.values():
        assert facts["same"] == facts["images"] > 0
        assert facts["difference"] < 1e-6
    images = torch.randn(2, 3, 32, 32)
    model, before = mim.load_memory("second/export"), mim.load_memory("first/export")
    answers, earlier = model.by_task(images), before.by_task(images)
    assert model.tasks["photos"].class_names == ("arrow", "circle", "cross")
    assert {name: logits.shape[1] for name, logits in answers.items()} == {"original": 3, "photos": 3, "photos-2": 3}
    torch.testing.assert_close(answers["photos"], earlier["photos"], atol=1e-6, rtol=0)
    alone = timm.create_model("local-dir:second/export", pretrained=True).eval()  # timm knows nothing of memory
    whole = timm.create_model("local-dir:whole/export", pretrained=True).eval()
    assert torch.equal(alone(images), whole(images))
    assert torch.equal(answers["original"], whole(images))
    assert mim.load("second/export").note.endswith(
        "; the memory of tasks that lies beside it is not part of the encoder"
    )


@pytest.mark.middle
def test_memory_that_was_stopped_goes_on_to_the_same_numbers(weights, photos, stop_after_a_checkpoint):
    long = ["--epochs", 40, "--eval_every", 1, "--from_scratch", "false", "--memory", 5, "--ema", 0.5]
    assert finetune(weights, photos, *long, "--out", "whole") == 0
    process = start(weights, photos, *long, "--out", "stopped")
    stop_after_a_checkpoint(process, "stopped")
    assert finetune(weights, photos, *long, "--out", "stopped", "--resume", "true") == 0
    whole, resumed = (load_file(Path(folder, "export", "memory.safetensors")) for folder in ("whole", "stopped"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--pool", "mean"], "--pool cls"),
        (["--drop_path", 0.2], "--drop_path: with --memory 5 the encoder stands still, so it has no effect"),
        (["--layer_decay", 0.9], "leave --layer_decay out"),
        (["--reduction", "tome"], "--reduction tome: with --memory 5 all tokens are looked at"),
        (["--tlm", 0.1], "--tlm: with --memory 5 the encoder stands still"),
    ],
)
def test_what_memory_leaves_no_room_for_is_refused(weights, photos, args, expected, capsys):
    assert finetune(weights, photos, "--memory", 5, *args) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("memory", [[], ["--memory", 1]], ids=["whole", "memory"])
def test_nothing_is_written_over_the_weights_that_it_starts_from(weights, photos, memory, capsys):
    shutil.copytree(weights, "first/export")
    Path("first/metrics.json").touch()
    assert finetune("first/export", photos, *memory, "--out", "first") == 2
    assert "would be replaced by what is learned from them\ntry:   --out first-2" in capsys.readouterr().err
    assert Path("first/metrics.json").exists()


def test_images_of_another_size_than_earlier_tasks_answer_for_are_refused(weights, photos, capsys):
    vit = timm.create_model(f"local-dir:{weights}", pretrained=True)
    folder = shutil.copytree(weights, "first")
    save_memory(MemoryViT(vit, {"photos": Task(vit, 2, ["a", "b"])}), Path(folder))
    assert finetune("first", photos, "--memory", 1, "--img_size", 64) == 2
    assert "--img_size 64: first answers for images of 32 x 32 pixels" in capsys.readouterr().err


def test_a_rotary_vit_is_refused_by_name(photos, capsys, tmp_path):
    encoder = Encoder("vit_small_patch16_dinov3", 32, 8, kwargs={"depth": 1, "embed_dim": 32, "num_heads": 2})
    card, scale = ModelCard("MAE", "photos"), {"mean": [0.5] * 3, "std": [0.5] * 3}
    export_backbone(encoder.vit, tmp_path / "rotary", card=card, **scale)
    assert finetune(str(tmp_path / "rotary"), photos, "--memory", 5) == 2
    text = capsys.readouterr().err
    assert "cannot take memory" in text
    assert "why:   timm's Eva is no plain ViT" in text
    assert finetune(str(tmp_path / "rotary"), photos, "--tlm", 0.1) == 2
    assert "is no plain ViT, whose connections are masked\nwhy:   it is timm's Eva" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("memory.json", "{}", "does not belong"),
        ("memory.json", "[1]", "does not belong"),
        (
            "memory.json",
            '{"tasks": {"a": {"classes": ["x"], "cells": 1000000000, "normed": true}}}',
            "1000000000 cells",
        ),
        ("memory.json", '{"tasks": {"a": {"classes": ["x"], "cells": 1, "normed": true}}}', "does not belong"),
        ("memory.safetensors", "damaged", "is damaged"),
    ],
)
def test_damaged_memory_is_refused(weights, tmp_path, file, text, expected):
    folder = Path(shutil.copytree(weights, tmp_path / "x"))
    vit = timm.create_model(f"local-dir:{folder}", pretrained=True)
    save_memory(MemoryViT(vit, {"photos": Task(vit, 2, ["a", "b"])}), folder)
    mim.load_memory(folder)
    (folder / file).write_text(text)
    with pytest.raises(UserError) as refused:
        mim.load_memory(folder)
    assert expected in f"{refused.value} {refused.value.why}"
